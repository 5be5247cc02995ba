"""Training: state, step, strategies, the loop, hooks, evaluation and checkpoints."""

from jaxnets.train.checkpoint import Checkpoints as Checkpoints
from jaxnets.train.diagnosis import Diagnosis as Diagnosis
from jaxnets.train.diagnosis import diagnose as diagnose
from jaxnets.train.evaluate import evaluate as evaluate
from jaxnets.train.evaluate import make_eval_step as make_eval_step
from jaxnets.train.loop import Clock as Clock
from jaxnets.train.loop import Several as Several
from jaxnets.train.loop import StepMetrics as StepMetrics
from jaxnets.train.loop import fit as fit
from jaxnets.train.loop import stack as stack
from jaxnets.train.metrics_log import MetricsLog as MetricsLog
from jaxnets.train.prefetch import Prefetch as Prefetch
from jaxnets.train.schedule import SCHEDULES as SCHEDULES
from jaxnets.train.schedule import make_schedule as make_schedule
from jaxnets.train.shapes import ShapeGuard as ShapeGuard
from jaxnets.train.sharding import Strategy as Strategy
from jaxnets.train.sharding import check_divides as check_divides
from jaxnets.train.sharding import make_strategy as make_strategy
from jaxnets.train.sharding import shard_by_rules as shard_by_rules
from jaxnets.train.state import TrainState as TrainState
from jaxnets.train.state import create_state as create_state
from jaxnets.train.step import TrainStep as TrainStep
from jaxnets.train.step import make_train_step as make_train_step

"""Names for components: models, losses, optimizers, data sets.

A name stands for a function, given as itself or as the string "module:function", which is imported
when the name is first looked up. So listing what there is imports nothing.

More names come from a user's own file (`load_file`) or module (`load_module`), which calls `register`.
Loading runs it: only Python code and `--plugin FILE` ask for that, never a config, a checkpoint or a
request. Who must not have a component changed under them leases it (`use`); while a lease is open,
`unload`, `reload` and `unregister` refuse and name the holder. All of it may be called from any thread.
"""

from jaxnets.registry.loading import file_modules as file_modules
from jaxnets.registry.loading import load_file as load_file
from jaxnets.registry.loading import load_module as load_module
from jaxnets.registry.loading import reload as reload
from jaxnets.registry.loading import unload as unload
from jaxnets.registry.table import Component as Component
from jaxnets.registry.table import components as components
from jaxnets.registry.table import get as get
from jaxnets.registry.table import kinds as kinds
from jaxnets.registry.table import names as names
from jaxnets.registry.table import register as register
from jaxnets.registry.table import resolve as resolve
from jaxnets.registry.table import unregister as unregister
from jaxnets.registry.table import use as use

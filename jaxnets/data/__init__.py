"""Data: named sets, the order of the examples, batches. NumPy in, dict of NumPy out, never jax."""

from jaxnets.data.batches import Batches as Batches
from jaxnets.data.batches import Part as Part
from jaxnets.data.batches import take as take
from jaxnets.data.buckets import bucket_of as bucket_of
from jaxnets.data.buckets import pad_batch as pad_batch
from jaxnets.data.buckets import pad_to as pad_to
from jaxnets.data.by_length import ByLength as ByLength
from jaxnets.data.by_length import Lengths as Lengths
from jaxnets.data.datasets import Dataset as Dataset
from jaxnets.data.datasets import load as load
from jaxnets.data.image_folder import ImageFolder as ImageFolder
from jaxnets.data.image_folder import ImageFolders as ImageFolders
from jaxnets.data.image_folder import open_images as open_images
from jaxnets.data.order import index as index
from jaxnets.data.parallel import Pairs as Pairs
from jaxnets.data.parallel import ParallelCorpus as ParallelCorpus
from jaxnets.data.parallel import load_parallel as load_parallel
from jaxnets.data.sources import ArrayRecords as ArrayRecords
from jaxnets.data.sources import Arrays as Arrays
from jaxnets.data.sources import Source as Source
from jaxnets.data.sources import write_array_records as write_array_records
from jaxnets.data.stream import Stream as Stream
from jaxnets.data.subwords import Subwords as Subwords

"""The durable trajectory store; needs neither Ray nor torch."""

from pmdflow._rust_buffer import Conflict as Conflict
from pmdflow._rust_buffer import CorruptLog as CorruptLog
from pmdflow._rust_buffer import DiskFault as DiskFault
from pmdflow._rust_buffer import StoreError as StoreError
from pmdflow._rust_buffer import StoreFull as StoreFull
from pmdflow._rust_buffer import StoreLocked as StoreLocked
from pmdflow._rust_buffer import StorePoisoned as StorePoisoned
from pmdflow.store.answers import BatchBuffers as BatchBuffers
from pmdflow.store.answers import ClaimAnswer as ClaimAnswer
from pmdflow.store.answers import EvalResult as EvalResult
from pmdflow.store.answers import Forked as Forked
from pmdflow.store.answers import LateMembers as LateMembers
from pmdflow.store.answers import StoredTrajectory as StoredTrajectory
from pmdflow.store.facade import TrajectoryStore as TrajectoryStore
from pmdflow.store.segments import encode_segments as encode_segments
from pmdflow.store.settings import StoreSettings as StoreSettings

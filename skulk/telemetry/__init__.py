"""What this machine is and has: processor, memory, disk, GPUs, and the compute backends that really work here."""

from skulk.telemetry.backends import Advertised, EngineProbe, probe_engine, tags_of
from skulk.telemetry.gpus import accelerators
from skulk.telemetry.host import disk_facts, load_average, system_facts
from skulk.telemetry.memory import memory_facts
from skulk.telemetry.processes import MemoryWatch, ProcessMemory, process_memory

__all__ = [
    "Advertised",
    "EngineProbe",
    "MemoryWatch",
    "ProcessMemory",
    "accelerators",
    "disk_facts",
    "load_average",
    "memory_facts",
    "probe_engine",
    "process_memory",
    "system_facts",
    "tags_of",
]

"""A driver that stands in for a GPU: launches compile as they would there, and what was compiled is read, not run."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from prime_kernels._triton import _launch, head, rows
from prime_kernels._triton._launch_config import Device

MULTIPROCESSORS = {80: 108, 90: 132}
# Bytes of shared memory of a multiprocessor, and what a program of one may have.
SHARED = {80: 167936, 90: 233472}
RESERVED = 1024


class Compiled(NamedTuple):
    """The machine code of a kernel, as one launch specialises it."""

    name: str
    warps: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread, of spilled registers and of local arrays."""
    sass: str
    shared: int
    """Bytes of shared memory of a program."""

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.sass))

    @property
    def instructions(self) -> int:
        return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", self.sass, re.MULTILINE))

    @property
    def loop(self) -> int:
        """Instructions of the longest loop; 0 without one."""
        labels, count, loops = {}, 0, [0]
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = count
            elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
                count += 1
                if jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line):
                    loops.append(count - labels.get(jump[1], count))
        return max(loops)

    def widths(self, transfer: str) -> Counter[int]:
        """{bits: instructions} of global loads ("LDG") or stores ("STG")."""
        found = re.findall(rf"\b{transfer}\.E((?:\.\w+)*)", self.sass)
        return Counter(next((bits for bits in (128, 64) if f".{bits}" in each), 32) for each in found)


class Driver:
    """A GPU of a compute capability, without one. The capability is also its number, by which Triton keeps kernels."""

    def __init__(self, capability: int) -> None:
        self.capability, self.seen = capability, []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": SHARED[capability] - RESERVED},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        self.warps = metadata.num_warps
        return lambda *arguments: None

    def _load(self, name, binary, shared, device):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary)
            cubin.flush()
            usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
            sass = _output(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
        (used,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        registers, stack, local = map(int, used)
        self.seen.append(Compiled(name, self.warps, registers, stack + local, sass, shared))
        return object(), object(), registers, 0, 1024


@contextmanager
def on(capability: int) -> Iterator[list[Compiled]]:
    """What is launched inside is compiled for this capability and then in the list."""
    stand_in, before = Driver(capability), driver._active
    device = Device(MULTIPROCESSORS[capability], divmod(capability, 10))
    with (
        mock.patch.object(_launch, "device_of", lambda _: device),
        mock.patch.object(rows, "device_of", lambda _: device),
        mock.patch.object(head, "device_of", lambda _: device),
    ):
        driver.set_active(stand_in)
        try:
            yield stand_in.seen
        finally:
            driver._active = before


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

"""What devices and the wires between them can do: a table with its sources, and what a command line says.

Peaks are dense and without sparsity, from the vendors' data sheets (NVIDIA H100, H200, A100, L40S, HGX B200).
``matmul``: the best rate that a matrix product was measured to reach, "maximum achievable matmul FLOPS" of
S. Bekman, Machine Learning Engineering, chapter Accelerators (torch 2.5 to 2.7); where it has no figure
(L40S, H100 PCIe), 80 % of the peak, the rate of its neighbours. ``fp32``: the rate of the data sheets without
tensor cores, as Hearth leaves TF32 off. Bandwidth of a link counts one direction.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from hearth.errors import ConfigError

GIB = 1 << 30
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB}
_UNITS |= {"TIB": 1 << 40}


@dataclass(frozen=True)
class Device:
    """One device. Rates in FLOP/s, memory in bytes, bandwidth in bytes a second."""

    name: str
    memory: int
    peak: float  # products in bfloat16, by the data sheet: what MFU is a share of
    matmul: float  # the same, as measured on large matrices
    fp8_matmul: float | None
    bandwidth: float  # of its memory
    link: str  # how it talks to its neighbours in the node unless the user says otherwise
    per_node: int = 8
    attention: float | None = None  # rate of attention, where it was measured
    fp32: float | None = None  # products in float32; None: ``matmul`` was measured in the job's own type
    launch: float = 5e-6  # seconds between two kernels that wait for each other; compiled code has fewer


@dataclass(frozen=True)
class Link:
    """A wire. ``bandwidth``: bytes a second in one direction for a device; ``latency``: seconds a message."""

    name: str
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind in nodes."""

    device: Device
    num_devices: int
    inside: Link  # between devices of a node
    between: Link  # between nodes, for one device
    per_node: int
    price: float | None = None  # of a device for an hour, in whatever currency

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return -(-self.num_devices // self.per_node)


DEVICES = {
    "b200": Device("B200 SXM", 180 * 10**9, 2250e12, 1745e12, None, 7.7e12, "nvlink5", fp32=75e12),
    "h200": Device("H200 SXM", 141 * 10**9, 989e12, 794.5e12, 1402.6e12, 4.8e12, "nvlink4", fp32=67e12),
    "h100": Device("H100 SXM", 80 * 10**9, 989e12, 794.5e12, 1402.6e12, 3.35e12, "nvlink4", fp32=67e12),
    "h100-pcie": Device("H100 PCIe", 80 * 10**9, 756e12, 0.8 * 756e12, None, 2.0e12, "pcie5", fp32=51e12),
    "a100": Device("A100 SXM 80GB", 80 * 10**9, 312e12, 271.2e12, None, 2.039e12, "nvlink3", fp32=19.5e12),
    "a100-40gb": Device(
        "A100 SXM 40GB", 40 * 10**9, 312e12, 271.2e12, None, 1.555e12, "nvlink3", fp32=19.5e12
    ),
    "a100-pcie": Device("A100 PCIe", 80 * 10**9, 312e12, 252.9e12, None, 1.935e12, "pcie4", fp32=19.5e12),
    "l40s": Device("L40S", 48 * 10**9, 362e12, 0.8 * 362e12, None, 0.864e12, "pcie4", fp32=91.6e12),
}

# Data sheets: NVLink 3/4/5 600, 900 and 1,800 GB/s both ways; PCIe 4/5 x16 32 and 64 GB/s one way; InfiniBand
# and RoCE 400 Gb/s a GPU on HGX H100 (one NDR port each), 200 Gb/s on HGX A100 (HDR). Latencies: NCCL's own
# model (src/graph/tuning.cc, ring, simple protocol) rounded.
LINKS = {
    "nvlink5": Link("NVLink 5", 900e9, 3e-6),
    "nvlink4": Link("NVLink 4", 450e9, 3e-6),
    "nvlink3": Link("NVLink 3", 300e9, 3e-6),
    "pcie5": Link("PCIe 5", 64e9, 6e-6),
    "pcie4": Link("PCIe 4", 32e9, 6e-6),
    "ib": Link("InfiniBand NDR", 50e9, 14e-6),
    "ib-hdr": Link("InfiniBand HDR", 25e9, 14e-6),
    "roce": Link("RoCE 400", 50e9, 16e-6),
    "ethernet": Link("Ethernet 100", 12.5e9, 40e-6),
    "ethernet-25": Link("Ethernet 25", 3.125e9, 40e-6),
    "local": Link("shared memory", 5e9, 30e-6),
}
# What a collective reaches of a link's bandwidth: nccl-tests on HGX H100 give about 370 of 450 GB/s for large
# messages within a node, and 45 to 48 of 50 GB/s a GPU between nodes.
LINK_EFFICIENCY = 0.8


def parse_bytes(text: str, *, key: str = "--gpu-memory") -> int:
    """``80GB`` (10⁹), ``74.5GiB`` (2³⁰). Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", text.upper())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value <= 0:
        raise ConfigError(
            f"{key} {text!r} is no amount of memory", fix="write a number with its unit: 80GB or 74GiB"
        )
    return value


def find_device(name: str) -> Device:
    """A device of the table. Raises ConfigError."""
    key = name.strip().lower()
    if key not in DEVICES:
        raise ConfigError(f"--gpu {name!r} is unknown", fix=f"use one of {', '.join(DEVICES)}, or cpu")
    return DEVICES[key]


def find_links(text: str | None, device: Device) -> tuple[Link, Link]:
    """``nvlink+ib``: the wire within a node and the one between nodes; what is left out is the usual one.

    Raises ConfigError for an unknown wire.
    """
    inside, _, between = (text or "").strip().lower().partition("+")
    if inside in ("", "nvlink", "pcie"):
        usual = device.link
        if inside == "pcie" and not usual.startswith("pcie"):
            usual = "pcie5" if usual in ("nvlink4", "nvlink5") else "pcie4"
        if inside == "nvlink" and not usual.startswith("nvlink"):
            raise ConfigError(f"--interconnect {text!r}: {device.name} has no NVLink", fix="write pcie+ib")
        inside = usual
    if between == "":
        between = "local" if device.link == "local" else "ib-hdr" if device.link == "nvlink3" else "ib"
    found = []
    for name in (inside, between):
        if name not in LINKS:
            raise ConfigError(
                f"--interconnect {text!r}: {name!r} is no wire that is known",
                fix=f"write INSIDE+BETWEEN, each one of nvlink, pcie, {', '.join(LINKS)}",
            )
        found.append(LINKS[name])
    return found[0], found[1]


def make_cluster(
    num_devices: int,
    *,
    gpu: str | Device = "h100",
    memory: int | None = None,
    interconnect: str | None = None,
    per_node: int | None = None,
    price: float | None = None,
) -> Cluster:
    """A cluster as a user describes it. Raises ConfigError."""
    device = find_device(gpu) if isinstance(gpu, str) else gpu
    if num_devices < 1:
        raise ConfigError(f"--gpus {num_devices} is not positive")
    if memory is not None:
        device = replace(device, memory=memory)
    size = per_node or device.per_node
    if num_devices > size and num_devices % size:
        raise ConfigError(
            f"--gpus {num_devices} is no multiple of the {size} devices of a node",
            fix="give whole nodes, or --gpus-per-node",
        )
    inside, between = find_links(interconnect, device)
    return Cluster(device, num_devices, inside, between, min(size, num_devices), price)

"""NVIDIA's Xid errors on the scale L1 .. L6: what each one asks of a serving rank.

After the "immediate action" of NVIDIA's Xid catalog for Ampere and newer ("Analyzing Xid Errors
with the Xid Catalog", docs.nvidia.com/deploy/xid-errors):

| catalog | level |
|---|---|
| IGNORE, and nothing to watch | 1 |
| RESTART_APP or IGNORE, of the application's own doing, or to be watched | 2 |
| RESTART_APP, of the hardware's doing; links whose fatality the number alone does not tell | 3 |
| memory errors that are contained, and what takes effect at a reset | 4 |
| RESET_GPU, RESTART_VM, CHECK_MECHANICALS | 5 |
| RESTART_BM: the device is gone | 6 |

Departures: 48 and 63 (a workflow, and IGNORE) drain, since a memory cell has just failed; 109 (a
reset) drains, since an endless kernel brings it about as well. 144 to 150 and 154 say by the
recovery action, which `nvml` reads besides, whether a reset is needed.
"""

UNKNOWN_XID_LEVEL = 2
"""An Xid that the table does not name: watch it, since new drivers bring new ones."""

XID_LEVELS: dict[int, tuple[int, str]] = {
    8: (2, "GPU stopped processing: a channel was idle too long"),
    11: (2, "invalid push buffer stream"),
    13: (2, "graphics engine exception: as a rule the application's"),
    25: (2, "invalid push buffer stream"),
    31: (2, "GPU memory page fault: as a rule the application's"),
    32: (2, "corrupted push buffer stream"),
    37: (1, "driver firmware error"),
    38: (1, "driver firmware error"),
    39: (3, "copy engine exception"),
    40: (3, "copy engine exception"),
    41: (3, "copy engine exception"),
    43: (2, "GPU stopped processing: as a rule the application's"),
    44: (2, "graphics engine fault during a context switch"),
    45: (1, "channels removed after another failure, or on request"),
    46: (5, "GPU stopped processing"),
    48: (4, "uncorrectable (double bit) ECC error"),
    54: (5, "auxiliary power is not connected"),
    62: (5, "internal micro-controller halt"),
    63: (4, "memory remapped; takes effect at a reset"),
    64: (5, "memory could not be remapped"),
    66: (2, "illegal access by the driver"),
    67: (2, "illegal access by the driver"),
    68: (2, "video decoder exception"),
    69: (2, "graphics engine class error"),
    74: (5, "NVLink error"),
    79: (6, "GPU has fallen off the bus"),
    80: (3, "corrupted data sent to the GPU"),
    92: (2, "high rate of single bit ECC errors"),
    94: (4, "contained memory error: only the application that ran is hit"),
    95: (5, "uncontained memory error"),
    109: (4, "context switch timeout"),
    110: (5, "security fault"),
    119: (5, "GSP firmware does not answer"),
    120: (5, "GSP firmware error"),
    121: (1, "C2C link error"),
    136: (5, "link training failed"),
    137: (2, "NVLink privilege error"),
    140: (5, "unrecovered ECC error"),
    143: (5, "GPU initialisation error"),
    144: (3, "NVLink error (SAW)"),
    145: (3, "NVLink error (RLW)"),
    146: (3, "NVLink error (TLW)"),
    147: (3, "NVLink error (TREX)"),
    148: (3, "NVLink error (NVLPW)"),
    149: (3, "NVLink error (NETIR)"),
    150: (3, "NVLink error (MSE)"),
    151: (5, "key rotation error"),
    154: (1, "recovery action changed: see the action itself"),
    155: (5, "NVLink error defined by software"),
    156: (4, "resource retired; takes effect at a reset"),
    157: (4, "resource could not be retired"),
    158: (5, "fatal timeout"),
    171: (4, "uncorrectable DRAM error"),
    172: (4, "uncorrectable SRAM error"),
}


def xid_level(xid: int) -> tuple[int, str]:
    """Level (1 to 6) and meaning of one Xid."""
    return XID_LEVELS.get(xid, (UNKNOWN_XID_LEVEL, "not in the table of known Xids"))

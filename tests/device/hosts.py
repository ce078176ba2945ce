"""Environments that let ranks share one device: NCCL accepts them only if they seem to be on different hosts."""

from __future__ import annotations


def _host_environment(number: int) -> dict[str, str]:
    return {
        "NCCL_HOSTID": f"host{number}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


HOSTS = {f"node{number}": _host_environment(number) for number in range(3)}

"""Ranks on one device that take themselves for those of several hosts: NCCL refuses two of one host."""

from __future__ import annotations


def _as_if_a_host(number: int) -> dict[str, str]:
    return {
        "NCCL_HOSTID": f"host{number}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


HOSTS = {f"node{number}": _as_if_a_host(number) for number in range(3)}

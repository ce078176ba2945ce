"""The private names of torch that are used, by module or class, except variants that some versions lack."""

from __future__ import annotations

from importlib.metadata import version

from lightning_ckptless.internals import names

_DATA = "torch.utils.data.dataloader"
_ELASTIC = "torch.distributed.elastic"
_SHARDED = "torch.distributed.fsdp._fully_shard"

WORKER = {
    "torch": "_foreach_copy_",
    "torch:Tensor": "_backward_hooks _version",
    "torch.storage:TypedStorage": "_untyped_storage",
    "torch.cuda": "_is_in_bad_fork",
    "torch.nn:Module": """
        _parameters _buffers _modules _forward_pre_hooks _forward_hooks _backward_pre_hooks _backward_hooks
    """,
    "torch.nn.parallel:DistributedDataParallel": """
        _build_debug_param_to_name_mapping _build_params_for_reducer _comm_hooks _ddp_init_helper _has_rebuilt_buckets
        _set_static_graph _update_process_group reducer
    """,
    "torch.distributed": "_compute_bucket_assignment_by_size _register_comm_hook",
    "torch.distributed:Reducer": "_get_zeros_like_grad_buckets _rebuild_buckets",
    "torch.distributed:ProcessGroup": "_device_types _get_backend",
    "torch.distributed.distributed_c10d": "_get_default_group _get_default_store _world",
    "torch.distributed.distributed_c10d:_World": "group_count pg_map",
    "torch._C._distributed_c10d": "_create_work_from_future",
    "torch.utils._python_dispatch": "TorchDispatchMode",
    "torch.utils._pytree": "tree_leaves tree_map_only",
    "torch.utils.data._utils.pin_memory": "pin_memory",
    "torch.utils.data:DataLoader": """
        _dataset_kind _get_iterator _index_sampler _iterator check_worker_number_rationality
    """,
    f"{_DATA}:_BaseDataLoaderIter": "_next_data _num_yielded _reset",
    f"{_DATA}:_MultiProcessingDataLoaderIter": "_try_put_index _worker_queue_idx_cycle",
    f"{_DATA}:_SingleProcessDataLoaderIter": "_next_data",
}
"""Names used by all workers."""

SHARDED = {
    "torch.distributed.device_mesh:DeviceMesh": "_dim_group_names get_coordinate",
    "torch.distributed.tensor:DTensor": "_local_tensor _op_dispatcher _spec",
    "torch.distributed.tensor._dtensor_spec": "DTensorSpec",
    "torch.distributed.tensor._redistribute": "_gen_transform_infos",
    "torch.distributed.tensor._utils": "compute_local_shape_and_global_offset",
    "torch.distributed.tensor.placement_types": "_StridedShard",
    "torch.distributed.fsdp:FSDPModule": "_get_fsdp_state",
    f"{_SHARDED}._fsdp_common:TrainingState": "IDLE",
    f"{_SHARDED}._fsdp_state:FSDPState": "_fsdp_param_group _is_root",
    f"{_SHARDED}._fsdp_param_group:FSDPParamGroup": "_all_gather_result fsdp_params mesh_info post_forward_mesh_info",
    f"{_SHARDED}._fsdp_param:FSDPParam": """
        _init_sharded_param _orig_size _param_fqn _setattr_on_modules _sharded_param_data _unsharded_param
        all_gather_outputs fsdp_placement mesh_info sharded_param
    """,
}
"""Names used by workers with sharded models."""

AGENT = {
    f"{_ELASTIC}.agent.server.local_elastic_agent:LocalElasticAgent": """
        _assign_worker_ranks _logs_specs _monitor_workers _pcontext _remaining_restarts _rendezvous _shutdown
        _start_workers _stop_workers
    """,
    f"{_ELASTIC}.multiprocessing.api:PContext": "_close _poll _start start",
    f"{_ELASTIC}.rendezvous.dynamic_rendezvous": """
        _Action _BackendRendezvousStateHolder _DistributedRendezvousOpExecutor _NodeDesc _RendezvousContext
        _RendezvousExitOp _RendezvousJoinOp _RendezvousState _remove_participant_epilogue
    """,
    f"{_ELASTIC}.rendezvous.dynamic_rendezvous:_Action": """
        ERROR_TIMEOUT FINISH KEEP_ALIVE MARK_RENDEZVOUS_COMPLETE SYNC
    """,
    f"{_ELASTIC}.rendezvous.dynamic_rendezvous:_BackendRendezvousStateHolder": "_backend _last_sync_time _record",
    f"{_ELASTIC}.rendezvous.dynamic_rendezvous:_DistributedRendezvousOpExecutor": "_record _state _state_holder",
    f"{_ELASTIC}.rendezvous.dynamic_rendezvous:_RendezvousState": """
        closed complete deadline last_heartbeats participants redundancy_list round wait_list
    """,
    f"{_ELASTIC}.rendezvous.dynamic_rendezvous:DynamicRendezvousHandler": """
        _bootstrap_store_info _create_tcp_store_server _heartbeat_lock _op_executor _record
        _shared_tcp_store_server _state_holder _stop_heartbeats _this_node
    """,
    f"{_ELASTIC}.rendezvous.utils": "_matches_machine_hostname",
}
"""Names used by agents."""


def require(table: names.Table) -> None:
    """Refuse a version of torch that lacks required names.

    Args:
        table: required names.

    Raises:
        VersionError: some names do not exist.
    """
    names.require("torch", version("torch"), table)

"""Public names of TensorRT's own Python bindings, as they were found in the wheels of PyPI.

TensorRT's libraries are not on PyPI, so the bindings (`tensorrt-cu12-bindings` 10.3.0, what JetPack 6 ships,
and `tensorrt-cu13-bindings` 11.4.0.106) were imported beside shared objects that define the few C functions
they look for, and `dir()` of the classes that the builder uses was written down. Names with a leading
underscore are left out.
"""

from __future__ import annotations

NAMES: dict[str, dict[str, str]] = {
    "10.3.0": {
        "Builder":
            "build_serialized_network create_builder_config create_network create_optimization_profile "
            "error_recorder get_plugin_registry gpu_allocator is_network_supported logger "
            "max_DLA_batch_size max_threads num_DLA_cores platform_has_fast_fp16 platform_has_fast_int8 "
            "platform_has_tf32 reset",
        "IBuilderConfig":
            "DLA_core add_optimization_profile algorithm_selector avg_timing_iterations "
            "builder_optimization_level can_run_on_DLA clear_flag clear_quantization_flag "
            "create_timing_cache default_device_type engine_capability flags get_calibration_profile "
            "get_device_type get_flag get_memory_pool_limit get_preview_feature get_quantization_flag "
            "get_tactic_sources get_timing_cache hardware_compatibility_level int8_calibrator "
            "is_device_type_set max_aux_streams num_optimization_profiles plugins_to_serialize "
            "profile_stream profiling_verbosity progress_monitor quantization_flags reset "
            "reset_device_type runtime_platform set_calibration_profile set_device_type set_flag "
            "set_memory_pool_limit set_preview_feature set_quantization_flag set_tactic_sources "
            "set_timing_cache",
        "INetworkDefinition":
            "add_activation add_assertion add_cast add_concatenation add_constant add_convolution_nd "
            "add_deconvolution_nd add_dequantize add_einsum add_elementwise add_fill add_gather "
            "add_gather_v2 add_grid_sample add_identity add_if_conditional add_input add_loop add_lrn "
            "add_matrix_multiply add_nms add_non_zero add_normalization add_one_hot add_padding_nd "
            "add_parametric_relu add_plugin_v2 add_plugin_v3 add_pooling_nd add_quantize "
            "add_ragged_softmax add_reduce add_resize add_reverse_sequence add_scale add_scale_nd "
            "add_scatter add_select add_shape add_shuffle add_slice add_softmax add_topk add_unary "
            "are_weights_marked_refittable builder error_recorder flags get_flag get_input get_layer "
            "get_output has_implicit_batch_dimension is_debug_tensor mark_debug mark_output "
            "mark_output_for_shapes mark_weights_refittable name num_inputs num_layers num_outputs "
            "remove_tensor set_weights_name unmark_debug unmark_output unmark_output_for_shapes "
            "unmark_weights_refittable",
        "OnnxParser":
            "clear_errors clear_flag flags get_error get_flag get_layer_output_tensor "
            "get_subgraph_nodes get_used_vc_plugin_libraries is_subgraph_supported num_errors "
            "num_subgraphs parse parse_from_file parse_with_weight_descriptors set_flag supports_model "
            "supports_model_v2 supports_operator",
        "ParserError":
            "code desc file func line local_function_stack local_function_stack_size node node_name "
            "node_operator",
        "IOptimizationProfile":
            "extra_memory_target get_shape get_shape_input set_shape set_shape_input",
        "ITensor":
            "allowed_formats broadcast_across_batch dtype dynamic_range get_dimension_name "
            "is_execution_tensor is_network_input is_network_output is_shape_tensor location name "
            "reset_dynamic_range set_dimension_name set_dynamic_range shape",
        "NetworkDefinitionCreationFlag":
            "EXPLICIT_BATCH STRONGLY_TYPED name value",
        "ILogger":
            "ERROR INFO INTERNAL_ERROR Severity VERBOSE WARNING log",
        "IProgressMonitor":
            "phase_finish phase_start step_complete",
        "IHostMemory":
            "dtype nbytes",
        "BuilderFlag":
            "BF16 DEBUG DIRECT_IO DISABLE_COMPILATION_CACHE DISABLE_TIMING_CACHE "
            "ERROR_ON_TIMING_CACHE_MISS EXCLUDE_LEAN_RUNTIME FP16 FP8 GPU_FALLBACK INT4 INT8 "
            "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS REFIT REFIT_IDENTICAL "
            "REFIT_INDIVIDUAL REJECT_EMPTY_ALGORITHMS SAFETY_SCOPE SPARSE_WEIGHTS STRIP_PLAN TF32 "
            "VERSION_COMPATIBLE WEIGHTLESS WEIGHT_STREAMING name value",
        "HardwareCompatibilityLevel":
            "AMPERE_PLUS NONE name value",
        "ITimingCache":
            "combine reset serialize",
        "Runtime":
            "DLA_core deserialize_cuda_engine engine_host_code_allowed error_recorder get_plugin_registry "
            "gpu_allocator load_runtime logger max_threads num_DLA_cores tempfile_control_flags "
            "temporary_directory",
        "ICudaEngine":
            "create_engine_inspector create_execution_context "
            "create_execution_context_without_device_memory create_serialization_config "
            "device_memory_size device_memory_size_v2 engine_capability error_recorder "
            "get_device_memory_size_for_profile get_device_memory_size_for_profile_v2 "
            "get_tensor_bytes_per_component get_tensor_components_per_element get_tensor_dtype "
            "get_tensor_format get_tensor_format_desc get_tensor_location get_tensor_mode get_tensor_name "
            "get_tensor_profile_shape get_tensor_profile_values get_tensor_shape "
            "get_tensor_vectorized_dim get_weight_streaming_automatic_budget hardware_compatibility_level "
            "has_implicit_batch_dimension is_debug_tensor is_shape_inference_io "
            "minimum_weight_streaming_budget name num_aux_streams num_io_tensors num_layers "
            "num_optimization_profiles profiling_verbosity refittable serialize serialize_with_config "
            "streamable_weights_size tactic_sources weight_streaming_budget weight_streaming_budget_v2 "
            "weight_streaming_scratch_memory_size",
        "IExecutionContext":
            "active_optimization_profile all_binding_shapes_specified all_shape_inputs_specified "
            "debug_sync device_memory engine enqueue_emits_profile error_recorder execute_async_v3 "
            "execute_v2 get_debug_listener get_debug_state get_input_consumed_event get_max_output_size "
            "get_output_allocator get_tensor_address get_tensor_shape get_tensor_strides infer_shapes "
            "name nvtx_verbosity persistent_cache_limit profiler report_to_profiler "
            "set_all_tensors_debug_state set_aux_streams set_debug_listener set_device_memory "
            "set_input_consumed_event set_input_shape set_optimization_profile_async set_output_allocator "
            "set_tensor_address set_tensor_debug_state temporary_allocator "
            "update_device_memory_size_for_shapes",
        "TensorIOMode":
            "INPUT NONE OUTPUT name value",
        "module":
            "Builder BuilderFlag HardwareCompatibilityLevel IBuilderConfig IHostMemory ILogger "
            "INetworkDefinition IOptimizationProfile IProgressMonitor ITensor ITimingCache "
            "NetworkDefinitionCreationFlag OnnxParser ParserError __version__",
    },
    "11.4.0.106": {
        "Builder":
            "build_engine_with_config build_serialized_network build_serialized_network_to_stream "
            "create_builder_config create_network create_optimization_profile error_recorder "
            "get_plugin_registry gpu_allocator is_network_supported logger max_DLA_batch_size "
            "max_threads num_DLA_cores reset",
        "IBuilderConfig":
            "DLA_core add_optimization_profile all_build_routes avg_timing_iterations build_route "
            "builder_optimization_level can_run_on_DLA clear_flag create_timing_cache "
            "default_device_type engine_capability flags get_device_type get_flag get_memory_pool_limit "
            "get_preview_feature get_tactic_sources get_timing_cache hardware_compatibility_level "
            "is_device_type_set l2_limit_for_tiling max_aux_streams max_num_tactics "
            "num_optimization_profiles plugins_to_serialize profile_stream profiling_verbosity "
            "progress_monitor remote_auto_tuning_config reset reset_device_type runtime_platform "
            "set_device_type set_flag set_memory_pool_limit set_preview_feature set_tactic_sources "
            "set_timing_cache tiling_optimization_level",
        "INetworkDefinition":
            "add_activation add_assertion add_attention add_attention_v2 add_cast add_concatenation "
            "add_constant add_convolution_nd add_cumulative add_deconvolution_nd add_dequantize "
            "add_dist_collective add_dynamic_quantize add_dynamic_quantize_v2 add_einsum "
            "add_elementwise add_fill add_gather add_gather_v2 add_grid_sample add_identity "
            "add_if_conditional add_input add_kv_cache_update add_loop add_lrn add_matrix_multiply "
            "add_moe add_nms add_non_zero add_normalization add_normalization_v2 add_one_hot "
            "add_padding_nd add_parametric_relu add_plugin add_plugin_v2 add_plugin_v3 add_pooling_nd "
            "add_quantize add_ragged_softmax add_reduce add_resize add_reverse_sequence "
            "add_rotary_embedding add_scale add_scale_nd add_scatter add_select add_shape add_shuffle "
            "add_slice add_softmax add_squeeze add_topk add_unary add_unsqueeze "
            "are_weights_marked_refittable builder error_recorder flags get_flag get_input get_layer "
            "get_output has_implicit_batch_dimension is_debug_tensor mark_debug mark_output "
            "mark_output_for_shapes mark_unfused_tensors_as_debug_tensors mark_weights_refittable name "
            "num_inputs num_layers num_outputs remove_tensor set_weights_name unmark_debug "
            "unmark_output unmark_output_for_shapes unmark_unfused_tensors_as_debug_tensors "
            "unmark_weights_refittable",
        "OnnxParser":
            "clear_errors clear_flag flags get_error get_flag get_layer_output_tensor "
            "get_subgraph_nodes get_used_vc_plugin_libraries is_subgraph_supported load_initializer "
            "load_model_proto num_errors num_subgraphs parse parse_from_file parse_model_proto "
            "set_builder_config set_flag supports_model_v2 supports_operator",
        "ParserError":
            "code desc file func line local_function_stack local_function_stack_size node node_name "
            "node_operator",
        "IOptimizationProfile":
            "extra_memory_target get_shape get_shape_input profile_stream set_shape set_shape_input",
        "ITensor":
            "allowed_formats broadcast_across_batch dtype get_dimension_name is_execution_tensor "
            "is_network_input is_network_output is_shape_tensor location name set_dimension_name shape",
        "NetworkDefinitionCreationFlag":
            "PREFER_AOT_PYTHON_PLUGINS PREFER_JIT_PYTHON_PLUGINS STRONGLY_TYPED name value",
        "ILogger":
            "ERROR INFO INTERNAL_ERROR Severity VERBOSE WARNING log",
        "IProgressMonitor":
            "phase_finish phase_start step_complete",
        "IHostMemory":
            "dtype nbytes",
        "BuilderFlag":
            "DEBUG DIRECT_IO DISABLE_COMPILATION_CACHE DISABLE_TIMING_CACHE DISTRIBUTIVE_INDEPENDENCE "
            "EDITABLE_TIMING_CACHE ERROR_ON_TIMING_CACHE_MISS EXCLUDE_LEAN_RUNTIME GPU_FALLBACK "
            "MONITOR_MEMORY REFIT REFIT_IDENTICAL REFIT_INDIVIDUAL SAFETY_SCOPE SPARSE_WEIGHTS "
            "STRICT_NANS STRIP_PLAN TF32 VERSION_COMPATIBLE WEIGHT_STREAMING name value",
        "HardwareCompatibilityLevel":
            "AMPERE_PLUS NONE SAME_COMPUTE_CAPABILITY name value",
        "ITimingCache":
            "combine query queryKeys reset serialize update",
        "Runtime":
            "DLA_core deserialize_cuda_engine dla_workspace_allocation_strategy engine_host_code_allowed "
            "error_recorder get_plugin_registry gpu_allocator load_runtime logger max_threads "
            "num_DLA_cores tempfile_control_flags temporary_directory",
        "ICudaEngine":
            "create_engine_inspector create_execution_context create_runtime_config "
            "create_serialization_config device_memory_size_v2 engine_capability error_recorder "
            "get_aliased_input_tensor get_device_memory_size_for_profile_v2 get_engine_stat "
            "get_tensor_bytes_per_component get_tensor_components_per_element get_tensor_dtype "
            "get_tensor_format get_tensor_format_desc get_tensor_location get_tensor_mode get_tensor_name "
            "get_tensor_profile_shape get_tensor_profile_values get_tensor_shape "
            "get_tensor_vectorized_dim get_weight_streaming_automatic_budget hardware_compatibility_level "
            "is_debug_tensor is_shape_inference_io name num_aux_streams num_io_tensors num_layers "
            "num_optimization_profiles profiling_verbosity refittable serialize serialize_with_config "
            "streamable_weights_size tactic_sources weight_streaming_budget_v2 "
            "weight_streaming_scratch_memory_size",
        "IExecutionContext":
            "active_optimization_profile all_binding_shapes_specified debug_sync device_memory engine "
            "enqueue_emits_profile error_recorder execute_async_v3 execute_v2 get_debug_listener "
            "get_debug_state get_input_consumed_event get_max_output_size get_output_allocator "
            "get_runtime_config get_tensor_address get_tensor_shape get_tensor_strides infer_shapes name "
            "nvtx_verbosity persistent_cache_limit profiler report_to_profiler "
            "set_all_tensors_debug_state set_aux_streams set_communicator set_debug_listener "
            "set_device_memory set_input_consumed_event set_input_shape set_optimization_profile_async "
            "set_output_allocator set_tensor_address set_tensor_debug_state temporary_allocator "
            "unfused_tensors_debug_state update_device_memory_size_for_shapes",
        "TensorIOMode":
            "INPUT NONE OUTPUT name value",
        "module":
            "Builder BuilderFlag HardwareCompatibilityLevel IBuilderConfig IHostMemory ILogger "
            "INetworkDefinition IOptimizationProfile IProgressMonitor ITensor ITimingCache "
            "NetworkDefinitionCreationFlag OnnxParser ParserError __version__",
    },
}  # fmt: skip
"""Version -> class -> its names, separated by spaces."""

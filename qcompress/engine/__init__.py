"""TensorRT engines: building, optimization profiles, the probe kit, and running an engine on this machine.

    build_process  starts the build as a child process, and survives its crashes
    build_engine   the child process that calls TensorRT
    profiles       shapes of the optimization profiles
    probe          writes the probe kit, and imports a device's measurement
    probe_kit      the scripts that measure an engine on a device
    local_run      runs the probe kit's script on this machine's GPU

No module imports `build_engine`: TensorRT's native libraries stay out of this process.
"""

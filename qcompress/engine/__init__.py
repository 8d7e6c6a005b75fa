"""What each GPU and TensorRT version accepts, and how an engine is built for it. No torch.

    table       the devices, and what a recipe may not ask of them
    graph       a read-only view of an ONNX file
    quantizers  the Q/DQ nodes of a view, in the words of the linter
    checks      what the linter looks for (more: weight_checks, convolutions, soundness)
    rules       the linter's rules, as a table
    lint        the rules applied to a file
    sizes       bytes that an engine of quantized weights may have
    profiles    shapes of the optimization profiles
    device      the GPU of this machine
    process     runs the builder, and outlives its crashes
    builder     the child process that calls TensorRT

Nothing imports `builder`: TensorRT's native libraries stay out of our own process.
"""

"""llama.cpp's side: its file format, its types, its library, its tools and its server.

```
types         ggml's tensor types: ids, block lengths, block sizes; pure
gguf          the reader of GGUF heads, fast and safe with untrusted files
model_file    ModelFile: a GGUF model on disk, whole or in shards; what all stages pass on
tensors       names, order, classes and stored shapes of tensors, and where shards are cut; pure
ggml          the binding to libggml-base: quantize rows, read them back (all ctypes for it)
ggml_graph    the same library, looked into while it computes
toolchain     where llama.cpp's tools are, which version they have, how one is run
server        llama-server while a block runs: started, loaded, watched, stopped
chat_client   requests to a running server, and its replies
tokenizer     token counts by llama-tokenize, of the toolchain that the user chose
model         a model in this process, by the bindings: tokens and log-probabilities of a chunk
convert       a checkpoint as one BF16 GGUF, and its vision part as an mmproj file
converter     the child program that runs upstream's conversion package
```

Other packages take a `ModelFile` wherever a path, a header or a digest is needed. They take names
of tensors from `tensors`, and run tools through a `Toolchain`. Two llama.cpp's are in play. That of
the lock file serves `ggml_graph`, `model` and `convert`. The toolchain that a user may name runs
everything that writes or serves a release, with its own libggml.

May change: a new ggml type is a row in `types`, which a test compares with the library. A newer
llama.cpp changes `OLDEST` in `toolchain`, and the layout in `ggml_graph` if its test fails. Must
stay: what `gguf` refuses, the order of `sort_tensors`, and the cuts of `split_into_shards`. By
these files have llama.cpp's own bytes. Nothing here imports llama_cpp, torch or openai before it is
needed, so that the command line starts fast.
"""

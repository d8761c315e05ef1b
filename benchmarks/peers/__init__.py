"""Fate beside llama.cpp: the same weights, tokens and memory limit, interleaved, in processes of their own.

`q4` and `gguf_file` write a store's weights as the peer reads them, `measurement` is what both processes run (it and
`llama_worker` import nothing of Fate, as the peer's environment has none), `cgroup` limits memory, `comparison` runs
it all and `summary` makes one document of it.
"""

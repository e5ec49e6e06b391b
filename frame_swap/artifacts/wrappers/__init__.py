"""Generated wrappers: the work of AOTAutograd's runtime wrappers, generated for one graph.

AOTAutograd calls compiled code through wrappers that serve every graph. The work that one graph needs of them is
known when it is compiled, and recorded in its metadata (`ViewAndMutationMeta`): mostly none. Here a function is
generated that does this work alone, and for a graph with a backward an `autograd.Function` derived from
AOTAutograd's own `CompiledFunction`. Rare cases stay with that base class, and so do their errors: second
derivatives, tangents that are not plain tensors, a transform of `torch.func` around the backward.

Work that is not generated here stays with AOTAutograd's wrappers; `Compiled.wrappers` names them.
"""

"""The legend of axis letters. Every signature, suffix and einsum of the package obeys it.

B  batch                     T  tokens of a sequence      S  keys (T, or the KV cache's)
I  tiles of a sequence       P  patches of a tile         N  flat patch tokens (B * I * P)
D, d  LLM width              E  vision width              F  MLP width
H  query heads               K  key-value heads           G  query heads a key-value head (H / K)
h  head dimension            V  vocabulary                L  layers (scanned)
v  columns of a shard of V   c  columns of a chunk of v
C  channels                  Y, X  pixels of a tile       k  labels of a patch, or its likeliest
M  visual tokens of a tile, of a sequence or of all       n  rows of a shard, or any axis
r  squeezed channels         y, x  rows and columns of a grid, or of a group; Y, X of another

An axis that may be of two kinds has a name in lower case, such as `heads`, of queries or of keys. A
letter has one size within a call; tests check every annotation as they run (`tests/typed.py`).

Logical axes of activations: act_batch act_len act_embed act_heads act_mlp act_vocab (act_batch for
N, too). Logical axes of parameters: layers embed mlp heads kv_heads head_dim vocab vis_embed
vis_mlp vis_heads patch.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt32

# Both, since what is not compiled computes with either; within jit every array is jax's.
Array = jax.Array | np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "UInt8", "UInt32"]

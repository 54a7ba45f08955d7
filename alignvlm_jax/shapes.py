"""The legend of axis letters. Every signature, suffix and einsum of the package obeys it.

B  batch rows                       T  tokens of a row (text and image tokens)   S  key length (T,
or the KV cache's) I  tiles of a row              P  patches of a tile                        N
flat patch tokens (B * I * P) D  LLM width                        E  vision width
         F  MLP width H  query heads                      K  key-value heads
          G  query heads a key-value head (H / K)
h  head dimension                   V  vocabulary                               L  layers (scanned)
C  channels                         Y, X  tile height and width in pixels       k  labels of a patch

Logical axes of activations: act_batch act_len act_embed act_heads act_mlp act_vocab (act_batch for
N, too). Logical axes of parameters: layers embed mlp heads kv_heads head_dim vocab vis_embed
vis_mlp vis_heads patch.
"""

from jaxtyping import Array, Bool, Float, Int, UInt8

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]

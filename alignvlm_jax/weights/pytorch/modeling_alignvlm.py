"""A document vision-language model of alignvlm_jax in PyTorch: page tiles -> vision encoder ->
connector -> visual tokens among the text embeddings -> language model.

This file stands in folders that `alignvlm_jax convert --export --format=transformers` wrote, for
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. N counts tiles, B prompts,
T is their length, D the language model's width.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from .components_alignvlm import CONNECTORS, ConnectorSizes, Parameters, encode


class AlignVLMConfig(PretrainedConfig):
    """Sizes of the three components, and the shapes of the parameters that have our own names."""

    model_type = "alignvlm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        connector_config=None,
        shapes=None,
        image_token_id=0,
        **kwargs,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.vision_config = vision_config or {}
        self.connector_config = connector_config or {}
        self.shapes = shapes or {}
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


class AlignVLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The whole model; inputs are those of the processor beside this file."""

    config_class = AlignVLMConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_cache_class = True
    # That of the language model's layers: of all components it is the one that is deep.
    supports_gradient_checkpointing = True
    # Modules that must stand on one device where a model is spread over several.
    _no_split_modules = (
        "Parameters",
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "SmolLM3DecoderLayer",
    )

    def __init__(self, config):
        super().__init__(config)
        # The language model is a class of transformers; the others are plain parameters.
        shapes = {"vision": {}, "connector": {}}
        for name, shape in config.shapes.items():
            component, _, rest = name.partition(".")
            shapes[component][rest] = shape
        self.vision = Parameters(shapes["vision"])
        self.connector = Parameters(shapes["connector"])
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module):
        """Initialises what no file holds: a new model's parameters, or one that is missing."""
        super()._init_weights(module)
        own = module.named_parameters(recurse=False) if isinstance(module, Parameters) else ()
        for name, x in own:
            # Of a module with a missing parameter the others were loaded.
            if getattr(x, "_is_hf_initialized", False):
                continue
            with torch.no_grad():
                x.normal_(0, 0.02) if name not in ("scale", "bias") else x.fill_(name == "scale")

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.llm.set_output_embeddings(value)

    def visual_tokens(self, pixel_values):
        """Visual tokens [M, D] of tiles [N, 3, height, width], tile after tile."""
        c = self.config.vision_config
        tile = [3, c["tile_height"], c["tile_width"]]
        if list(pixel_values.shape[1:]) != tile:
            raise ValueError(f"pixel_values are {list(pixel_values.shape)}; each tile is {tile}")
        # The table is live: connectors that average its rows need no copy of it.
        table = self.get_input_embeddings().weight
        vision, connector = (next(x.parameters()) for x in (self.vision, self.connector))
        # What lies on a disk comes back in the forward call of its module, which none of these has.
        if any(x.is_meta for x in (vision, connector, table)):
            raise ValueError(
                "vision, connector and the embeddings of the language model cannot be offloaded: "
                "give them a device in device_map"
            )
        # Each where it is, and in its own type: the language model may be quantised alone.
        features = encode(self.vision, c, pixel_values.to(vision))
        sizes = ConnectorSizes(self.config)
        embed = CONNECTORS[sizes.options["name"]]
        return embed(self.connector, sizes, features.to(connector), table)

    def embed(self, input_ids, pixel_values=None):
        """Embeddings [B, T, D] of prompts, visual tokens at their image tokens in order."""
        is_image = input_ids == self.config.image_token_id
        # The image token may lie beyond the table.
        x = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        has_pixels = pixel_values is not None and len(pixel_values)
        visual = self.visual_tokens(pixel_values) if has_pixels else ()
        if len(visual) != is_image.sum():
            raise ValueError(
                f"{is_image.sum()} image tokens and {len(visual)} visual tokens of pixel_values"
            )
        # Row after row: the n-th visual token of the batch stands at its n-th image token.
        return x.masked_scatter(is_image[..., None], visual.to(x)) if has_pixels else x

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds are needed, and not both")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("inputs_embeds come with visual tokens in them: give no pixel_values")
        if inputs_embeds is None and input_ids.shape[1] == 1 and pixel_values is None:
            # A token that was generated, be it the image token, is no place of an image.
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        if labels is not None:
            # Nobody has to say an image, whose token may lie beyond the logits.
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, inputs_embeds=None, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = kwargs.get("past_key_values")
        is_empty = cache is None or not cache.get_seq_length()
        # Pages are read with their prompt, which may go on from a cache; what follows sees them in
        # the cache.
        if is_empty or kwargs.get("is_first_iteration"):
            inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, pixel_values=None, **kwargs
    ):
        """Repeats each row of a batch, and its tiles as often."""
        if pixel_values is not None and input_ids is not None:
            counts = (input_ids == self.config.image_token_id).sum(1)
            # A row has any number of tiles: repeated one by one they would change rows.
            if num_image_tokens := int(counts.sum()):
                rows = (counts * len(pixel_values) // num_image_tokens).tolist()
                repeated = [x for x in pixel_values.split(rows) for _ in range(expand_size)]
                pixel_values = torch.cat(repeated)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )
        return input_ids, {**kwargs, "pixel_values": pixel_values}

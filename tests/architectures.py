"""Every architecture of the pinned transformers that `AutoModelForCausalLM` knows, made tiny.

    PYTHONPATH=. python -m tests.architectures      # says what each became, and what could not be made

A configuration class says itself how large its model is: a field is shrunk by its name, a list with
an entry per layer keeps one layer of every kind. What this rule cannot know stands in EXCEPTIONS.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 160
WINDOW = 8  # of sliding attention: shorter than the rows of the tests
PAD, END = 0, 1

# What a field means -> its tiny value, and the names that configurations have for it.
SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length",
    64: "intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size encoder_ffn_dim "
    "decoder_ffn_dim feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "mamba_intermediate mamba_d_ssm",
    32: "hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim "
    "input_embedding_size output_embedding_size attention_hidden_size lru_width "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size num_attention_channels router_hidden_size",
    16: "mamba_d_head mamba_head_dim mamba_headdim chunk_size mamba_chunk_size index_head_dim "
    "num_experts_dim q_lora_rank",
    WINDOW: "sliding_window sliding_window_size window_size attention_window_size local_attention "
    "attention_chunk_size keep_window_size head_dim swa_head_dim d_head kv_channels "
    "attention_head_size dim_head qk_nope_head_dim v_head_dim kv_lora_rank linear_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size "
    "rotary_dim time_step_rank mamba_dt_rank o_lora_rank hidden_size_per_layer_input "
    "laurel_rank hc_lowrank adapter_rank gated_norm_rank loop_gate_rank index_topk "
    "query_pre_attn_scalar block_size rel_extent d_rel",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads swa_num_attention_heads linear_num_heads linear_num_value_heads "
    "mamba_n_heads mamba_num_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "qk_rope_head_dim index_n_heads num_encoder_attention_heads num_decoder_attention_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group "
    "n_groups mamba_n_groups mamba_ngroups",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts topk_group n_mamba_heads "
    "first_k_dense_replace num_dense_layers",
}
TINY = {field: value for value, fields in SIZES.items() for field in fields.split()}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "encoder_layers")
EXCEPTIONS: dict[str, dict[str, Any]] = {}


def _kinds_of_layers(fields: dict[str, Any], depth: int) -> list[int]:
    """The first layer of every kind, and two at least: kinds differ in some list that has an entry
    per layer.
    """
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == depth]
    kinds = [str(entries) for entries in zip(*lists)] or [""] * depth
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return firsts if len(firsts) > 1 else [0, 1]


def _shrunk(config: PreTrainedConfig, more_layers: int) -> dict[str, Any]:
    """The arguments that make the class of `config` tiny."""
    fields = config.to_dict()
    own = set(type(config).__dataclass_fields__)
    depth = next((fields[name] for name in DEPTHS if name in fields), 0)
    layers = _kinds_of_layers(fields, depth)
    layers += layers[-1:] * more_layers
    tiny: dict[str, Any] = {}
    for name in own & fields.keys():
        value = fields[name]
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            tiny[name] = _shrunk(getattr(config, name), more_layers)
        elif name in DEPTHS:
            tiny[name] = len(layers)
        elif isinstance(value, list | tuple) and len(value) == depth:
            tiny[name] = [value[i] for i in layers]
        elif name in TINY and isinstance(value, int) and not isinstance(value, bool):
            tiny[name] = TINY[name] if value else value
    return tiny


def tiny_config(name: str, more_layers: int = 0) -> PreTrainedConfig:
    """The configuration of architecture `name` (a model type), with `more_layers` than it needs to
    have every kind of layer.
    """
    config_class = CONFIG_MAPPING[name]
    exceptions = EXCEPTIONS.get(name, {})
    default = config_class(**exceptions)
    tiny = _shrunk(default, more_layers) | exceptions
    special = {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": None}
    return config_class(**tiny, **special)


def make_model(name: str, seed: int, more_layers: int = 0) -> PreTrainedModel:
    """A random model in fp32, in evaluation mode. No weight is zero, so that none can be lost
    unseen; calls with the same arguments give the same weights.
    """
    config = tiny_config(name, more_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight in model.state_dict().values():
            if weight.is_floating_point():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.eval()


def _names() -> list[str]:
    """One name for every class of models."""
    names = {of_class: name for name, of_class in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    return sorted(names.values())


NAMES = _names()


def main() -> None:
    failed = 0
    for name in sys.argv[1:] or NAMES:
        try:
            model = make_model(name, 0)
            size = sum(weight.numel() for weight in model.parameters())
            with torch.no_grad():
                logits = model(input_ids=torch.arange(2, 22)[None]).logits
            text = model.config.get_text_config(decoder=True)
            print(
                f"{name}: {type(model).__name__}, {text.num_hidden_layers} layers, {size:,} weights, "
                f"{tuple(logits.shape)} std {logits.std():.2f}", flush=True
            )
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{name}: FAILED {type(error).__name__}: {str(error).strip()[:300]!r} at {where.filename.split('/models/')[-1]}:{where.lineno}", flush=True)
    print(f"{failed} failed")


if __name__ == "__main__":
    main()

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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 160
WINDOW = 8  # of sliding attention: shorter than the rows of the tests
PAD, END = 0, 1
OTHER = 5  # the token of images and the like, which no row of the tests has

# What a field means -> its tiny value, and the names that configurations have for it.
SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size "
    "shape_vocab_size encoder_hash_byte_group_vocab",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length",
    64: "intermediate_size ffn_dim n_inner dff dim_ff d_inner ffn_hidden_size encoder_ffn_dim "
    "decoder_ffn_dim feed_forward_size intermediate_size_mlp dense_intermediate_size "
    "mamba_intermediate mamba_d_ssm",
    32: "hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim "
    "input_embedding_size output_embedding_size attention_hidden_size lru_width "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size router_hidden_size pronunciation_embed_dim shape_embed_dim "
    "out_hidden_size hidden_size_global adapter_in_dim adapter_out_dim adapter_input_size",
    # Heads of an index that chooses positions: with few of them some scores are exactly 0, and ties
    # fall otherwise beside other rows.
    16: "mamba_d_head mamba_head_dim mamba_headdim chunk_size mamba_chunk_size index_head_dim "
    "q_lora_rank index_n_heads",
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
    "qk_rope_head_dim num_encoder_attention_heads num_decoder_attention_heads",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group "
    "n_groups mamba_n_groups mamba_ngroups n_mamba_heads",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts topk_group "
    "first_k_dense_replace num_dense_layers",
}
TINY = {field: value for value, fields in SIZES.items() for field in fields.split()}
DEPTHS = set(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers depth".split()
)
_QSA = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8} | {
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_SLIDING_MLA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_v_head_dim": 8} | {
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 12,
    "swa_qk_nope_head_dim": 8,
}
# Before shrinking: per-layer lists that the configuration's own defaults lack.
DEFAULTS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
# After it: what the defaults lack otherwise, or what depends on the sizes in a way of its own.
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "dots3_note_text": _SLIDING_MLA,
    "llama4_text": {"moe_layers": [1]},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "initializer_range": 0.2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128},  # it rounds half of this up to 64
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
FIXED_DEPTH = {"gpt_neo"}
# Layers of the default configuration that are kept where one of every kind is not enough.
LAYERS = {
    "dory": [0, 1, 3],
    "lfm2": [0, 1],
    "llama4_text": [0, 3],
    "recurrent_gemma": [0, 1, 2],
    "zamba": [0, 2, 7],  # two that share their attention
    "zamba2": [0, 6, 12],
}


def _kinds_of_layers(fields: dict[str, Any], depth: int) -> list[int]:
    """The first layer of every kind, and two at least: kinds differ in some list that has an entry
    per layer.
    """
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == depth]
    kinds = [str(entries) for entries in zip(*lists)] or [""] * depth
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    return firsts if len(firsts) > 1 else [0, 1]


def _shrunk(config: PreTrainedConfig, more_layers: int) -> dict[str, Any]:
    """The arguments that make the class of `config` tiny. What it computes itself is left to it."""
    fields = vars(config)
    depth = next((fields[name] for name in fields if name in DEPTHS), 0)
    layers = LAYERS.get(config.model_type) or _kinds_of_layers(fields, depth)
    if config.model_type not in FIXED_DEPTH:
        layers = layers + layers[-1:] * more_layers
    tiny: dict[str, Any] = {}
    for name, field in type(config).__dataclass_fields__.items():
        value = fields.get(name)
        if name in config.sub_configs and value is not None:
            tiny[name] = _shrunk(value, more_layers)
        elif name in DEPTHS:
            tiny[name] = len(layers)
        elif isinstance(value, list | tuple) and len(value) == depth:
            tiny[name] = [TINY.get(name, value[i]) for i in layers]
        elif name in TINY and isinstance(field.default, int) and field.default:
            tiny[name] = TINY[name]
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            tiny[name] = min(value, OTHER) if isinstance(value, int) else value
    if "kv_lora_rank" in tiny:  # every head has keys of its own, out of one latent
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    if "is_decoder" in fields:
        tiny["is_decoder"] = True
    special = {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": 2}
    return tiny | special | FIELDS.get(config.model_type, {})


def tiny_config(name: str, more_layers: int = 0) -> PreTrainedConfig:
    """The configuration of architecture `name` (a model type), with `more_layers` than it needs to
    have every kind of layer.
    """
    config_class = CONFIG_MAPPING[name]
    return config_class(**_shrunk(config_class(**DEFAULTS.get(name, {})), more_layers))


def make_model(name: str, seed: int, more_layers: int = 0) -> PreTrainedModel:
    """A random model in fp32, in evaluation mode. No weight is zero, so that none can be lost
    unseen; calls with the same arguments give the same weights.
    """
    config = tiny_config(name, more_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name_of, weight in model.state_dict().items():
            # MiniMax keeps its decays, which follow from its configuration, where weights are.
            if weight.is_floating_point() and not name_of.endswith(("_decay", "slope_rate")):
                weight.add_(torch.randn_like(weight), alpha=0.15)
    return model.eval()


# What cannot be tried here, and why.
LEFT_OUT = {
    "gemma3n": "its vision tower needs timm, which is not installed",
    "gemma4_assistant": "reads another model's keys and values",
    "gemma4_unified_assistant": "reads another model's keys and values",
    "musicgen": "its tokens are rows of audio codes",
    "musicgen_melody": "its tokens are rows of audio codes",
}
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - LEFT_OUT.keys())
# Those that the test suite tries: every kind of layer, cache, head and refusal that is known. All of
# NAMES take ten minutes (python -m tests.dist.architecture_outcomes --all).
SUITE = """
    apertus bamba bart bert blenderbot bloom blt codegen cohere2 ctrl dbrx deepseek_v3 diffllama
    doge dory ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba fuyu gemma2 gemma3n_text
    gemma4_text git glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox granite jamba lfm2 llama llama4_text
    mamba mamba2 minimax mixtral mpt nemotron olmo2 openai-gpt opt phi3 phimoe qwen2 qwen3_next
    recurrent_gemma sarvam_moe smollm3 starcoder2 zamba2
""".split()


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, for all of the vocabulary: <pad>, <end>, the roles, w6, w7, ..."""
    words = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>"]
    words += [f"w{token}" for token in range(len(words), VOCABULARY)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


def main() -> None:
    failed = 0
    for name in sys.argv[1:] or NAMES:
        try:
            model = make_model(name, 0)
            size = sum(weight.numel() for weight in model.parameters())
            with torch.no_grad():
                logits = model(input_ids=torch.arange(2, 22)[None]).logits
            print(
                f"{name}: {type(model).__name__}, {size:,} weights, "
                f"{tuple(logits.shape)} std {logits.std():.2f}",
                flush=True,
            )
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            print(
                f"{name}: FAILED {type(error).__name__}: {str(error).strip()[:300]!r} at {where.filename.split('/models/')[-1]}:{where.lineno}",
                flush=True,
            )
    print(f"{failed} failed")


if __name__ == "__main__":
    main()

"""Decoder models of many families, tiny and random, from transformers' own configs."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 48
POSITIONS = 128
_SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_INDEXED = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_NO_KV = {"num_key_value_heads": 4}
_BART = {
    "num_hidden_layers": None, "hidden_size": None, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4,
}  # fmt: skip
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": _MOE | {"head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1} | _WINDOW,
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": _ROUTED | _MLA,
    "axk2": _ROUTED | _MLA | _INDEXED | _SPARSE | {"gated_norm_rank": 4},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "bart": _BART,
    "bert (is_decoder)": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere (qk norm)": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5} | _WINDOW,
    "cohere2_moe": _MOE | {"head_dim": 8, "logit_scale": 0.5} | _WINDOW,
    "ctrl": {"dff": 48, "n_positions": POSITIONS},
    "cwm": {"head_dim": 8, **_WINDOW},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "num_hidden_layers": None, "hidden_size": None, "num_attention_heads": None,
        "max_position_embeddings": None, "num_key_value_heads": None, "intermediate_size": None,
    },
    "deepseek_v2": _ROUTED | _MLA | {"first_k_dense_replace": 1, "n_shared_experts": 1, "topk_method": "greedy"},
    "deepseek_v3": _ROUTED | _MLA | {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "deepseek_v32": _ROUTED | _MLA | _INDEXED | _SPARSE,
    "deepseek_v4": _ROUTED | {
        "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 16,
        "index_topk": 16, "mlp_layer_types": ["moe", "moe"],
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "diffllama": {},
    "doge": {},
    "dots1": _ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": {
        "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_end_index": 1,
    },
    "exaone4": _WINDOW,
    "exaone_moe": _MOE | {"n_group": 1, "topk_group": 1} | _WINDOW | _SPARSE,
    "falcon": {"alibi": False, "multi_query": True, "parallel_attn": True},
    "falcon (alibi)": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon (new decoder)": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": _MOE,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0} | _WINDOW,
    "gemma3_text": {"head_dim": 8} | _WINDOW,
    "gemma3n_text": {
        "head_dim": 8, "num_hidden_layers": 4, "sliding_window": 8, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    } | _WINDOW,
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": _ROUTED | {"first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": _ROUTED | _MLA | _SPARSE,
    "glm_moe_dsa": _ROUTED | _MLA | _INDEXED | _SPARSE | {"indexer_types": ["full", "full"]},
    "gpt2": {"n_inner": 48},
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_neox (no parallel residual)": {"use_parallel_residual": False},
    "gpt_neox_japanese": {},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | _WINDOW,
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5,
                "embedding_multiplier": 2.0},
    "granite_swa": _WINDOW,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe_swa": {"num_local_experts": 4, "num_experts_per_tok": 2} | _WINDOW,
    "granitemoehybrid": _MAMBA | _HYBRID | {"num_local_experts": 4, "shared_intermediate_size": 32},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    "helium": {"head_dim": 8, "num_key_value_heads": 2},
    "hrm_text": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hy_v3": _MOE | {"head_dim": 8} | _SPARSE,
    "hy_v4": _ROUTED | _MLA | _INDEXED | _SPARSE | {"head_dim": 8, "indexer_types": ["full", "full"],
                                                   "layer_types": ["indexed_attention", "indexed_attention"]},
    "hyperclovax": {},
    "inkling_text": {
        "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8,
        "sliding_window_size": 8, "d_rel": 8, "rel_extent": 16, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "layer_types": ["hybrid_sliding", "hybrid"],
        "logits_mup_width_multiplier": 1.0,
    },
    "jais2": {},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
              "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
    "kimi_linear": _MOE | _MLA | _SPARSE | _HYBRID | {
        "num_experts_per_tok": None, "num_experts_per_token": 2, "linear_head_dim": 8, "linear_num_heads": 4,
    },
    "laguna": _MOE | _WINDOW | {"head_dim": 8, "shared_expert_intermediate_size": 16,
                                "num_attention_heads_per_layer": [4, 4], **_SPARSE},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": {},
    "llama (tied)": {"tie_word_embeddings": True},
    "llama (biases)": {"attention_bias": True, "mlp_bias": True},
    "llama (llama3 rope)": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "llama (yarn rope)": {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64},
    "llama4_text (chunks)": {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
                             "attention_chunk_size": 8},
    "longcat_flash": {**_MLA, "num_layers": 2, "ffn_hidden_size": 48, "moe_topk": 2, "n_routed_experts": 4,
                      "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "head_dim": 8},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "megatron-bert (is_decoder)": {"is_decoder": True},
    "mellum": _MOE | {"num_experts": None, "num_local_experts": 4, "head_dim": 8} | _WINDOW,
    "mimo_v2_flash": _ROUTED | {"head_dim": 16, "v_head_dim": 8} | _WINDOW | _SPARSE,
    "minicpm3": _MLA | {"head_dim": 8, "scale_emb": 1, "dim_model_base": 32},
    "minimax": {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"], "block_size": 8,
                "head_dim": 8},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "ministral": {"head_dim": 8} | _WINDOW,
    "ministral3": {"head_dim": 8},
    "mistral": {},
    "mistral (window)": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "modernbert-decoder": {"local_attention": 16, **_WINDOW},
    "mpt": {"n_heads": 4, "n_layers": 2, "d_model": 32, "max_seq_len": POSITIONS},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        "num_hidden_layers": None, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16,
        "n_routed_experts": 4, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
        "use_mamba_kernels": False,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmo_hybrid": _HYBRID | {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                              "linear_value_head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt (projected)": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2 (window)": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_5_text": _HYBRID | _LINEAR | {"head_dim": 8},
    "qwen3_5_moe_text": _HYBRID | _LINEAR | _MOE | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _MOE | {"head_dim": 8, "num_experts": None, "num_local_experts": 4},
    "qwen3_next": _HYBRID | _LINEAR | _MOE | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "qwen4_exp_text": _HYBRID | _LINEAR | _MOE | {"head_dim": 8, "shared_expert_intermediate_size": 16,
                      "hc_count": 2, "hc_lowrank": 8, "layer_types": ["linear_attention", "indexed_attention"],
                      "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
                      "indexer_compress_ratio": 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "num_hidden_layers": 3},
    "roberta (is_decoder)": {"is_decoder": True},
    "rwkv": {"context_length": POSITIONS},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": _ROUTED | {"head_dim": 8, "n_shared_experts": 1},
    "stablelm": {},
    "stablelm (parallel, qk norm)": {"use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": {},
    "starcoder2 (window)": {"sliding_window": 8},
    "vaultgemma": {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0} | _WINDOW,
    "xglm": {"num_layers": 2, "ffn_dim": 48, "attention_heads": 4, "d_model": 32},
    "xlnet": {"max_position_embeddings": None, "n_layer": 2, "d_inner": 48, "d_head": 8},
    "xlstm": {"num_heads": 2, "chunk_size": 16, "mode": "inference"},
    "youtu": _MLA,
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "linear_attention", "hybrid",
                                                            "linear_attention", "hybrid"],
              "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2, "mamba_d_state": 8,
              "mamba_dt_rank": 8, "use_mamba_kernels": False, "num_key_value_heads": 4},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
               "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 16, "adapter_rank": 4,
               "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
               "use_mamba_kernels": False, "hybrid_layer_ids": [2], "kv_channels": 8, "num_query_groups": 4},
    "zaya": _MOE | {"num_experts_per_tok": 1, "head_dim": 8, "router_hidden_size": 16},
}  # fmt: skip
"""By family, and variant of it, what its config is told beyond the common shape; None takes a part of that out."""


def config_of(name: str, **more: Any) -> Any:
    """The config of an entry of `FAMILIES`, with further settings."""
    settings = {k: v for k, v in (_SHAPE | FAMILIES[name] | more).items() if v is not None}
    config = AutoConfig.for_model(name.split(" ")[0], **settings)
    for key, value in config.to_dict().items():
        if re.search("dropout|pdrop", key) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


_STD = {"zamba": 0.1, "zamba2": 0.15, "nemotron_h": 0.15}
"""Where 0.25 makes nearly all of the mass one token, or the rounding of a long sum large."""


def tiny_model(name: str, **more: Any) -> PreTrainedModel:
    """The model of an entry of `FAMILIES`, with ``sdpa`` or, where its class has none, ``eager``."""
    config, std = config_of(name, **more), _STD.get(name, 0.25)
    try:
        return random_model(config, std=std)
    except ValueError:
        return random_model(config, "eager", std)


def random_model(config: Any, attn_implementation: str = "sdpa", std: float = 0.25) -> PreTrainedModel:
    """A model in float32 with random weights, large enough that attention matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn_implementation)
        for name, parameter in model.named_parameters():
            # Decays, convolutions and norms have a meaning as they are.
            if parameter.dim() > 1 and not any(part in name for part in ("A_log", "conv", "time_", "norm")):
                torch.nn.init.normal_(parameter, std=std)
            elif name.endswith("bias") and "norm" not in name and "dt_" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model

"""What the keys of a config change, in one table: a difference in some garbles the result, in others nothing.

Keys are those of `surgery.checkpoint.config.normalised_config`; a part's prefix does not count. A key that the table
lacks may change the function: it is told as well.
"""

from __future__ import annotations

from collections.abc import Mapping

POSITIONS, ATTENTION, EXPERTS = "positions", "attention", "which experts run"
NUMERICS, ACTIVATION, SCALES, HEAD = "numerics", "the activation function", "scales", "the output head"
UNKNOWN = "may change the function"
# Not told: shapes, tokenizers or the files themselves show it, or nothing does.
SHAPES, VOCABULARY, NOTHING = "shapes", "vocabulary only", "not the function"
NOT_TOLD = frozenset({SHAPES, VOCABULARY, NOTHING})

_KEYS: Mapping[str, str] = {
    POSITIONS: "rope_theta rope_scaling partial_rotary_factor max_position_embeddings rotary_dim rotary_pct "
    "rotary_emb_base original_max_position_embeddings position_embedding_type alibi no_rope_layers "
    "no_rope_layer_interval nope_layer_interval rope_interleave layer_rope_theta compress_rope_theta "
    "relative_attention_num_buckets relative_attention_max_distance mrope_section position_biased_input "
    "max_2d_position_embeddings max_position_embedding",
    ATTENTION: "query_pre_attn_scalar attn_logit_softcapping sliding_window layer_types attention_multiplier "
    "attention_chunk_size use_bidirectional_attention is_causal qk_layernorm use_qk_norm attn_temperature_tuning "
    "floor_scale attn_scale scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn clip_qkv "
    "index_topk use_sliding_window max_window_layers sliding_window_pattern full_attention_interval attention_types "
    "attention_window num_kv_shared_layers key_multiplier attention_in_multiplier attention_out_multiplier window_size "
    "local_attention global_attn_every_n_layers parallel_attn use_parallel_residual",
    EXPERTS: "num_experts_per_tok norm_topk_prob routed_scaling_factor n_group topk_group topk_method scoring_func "
    "decoder_sparse_step mlp_only_layers mlp_layer_types first_k_dense_replace moe_layer_freq moe_layers "
    "moe_layer_interval interleave_moe_layer_step router_scaling_factor route_scale moe_renormalize norm_min "
    "moe_norm_min use_expert_bias top_k_experts expert_layer_period expert_layer_offset moe_router_logit_softcapping "
    "moe_routed_scaling_factor expert_capacity router_dtype",
    NUMERICS: "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon epsilon eps hc_eps "
    "mixer_rms_eps attention_softmax_in_fp32 residual_in_fp32",
    ACTIVATION: "hidden_act swiglu_limit swiglu_alpha activation_sparsity_pattern mlp_hidden_act feed_forward_proj "
    "dense_act_fn is_gated_act mamba_hidden_act projector_hidden_act activation gelu_activation",
    SCALES: "final_logit_softcapping embedding_multiplier residual_multiplier logits_scaling logit_scale scale_emb "
    "scale_depth dim_model_base lm_head_multiplier scale_embedding ssm_multipliers mlp_multipliers ssm_in_multiplier "
    "ssm_out_multiplier scale_factor residual_scale embedding_scale output_multiplier do_layer_norm_before "
    "apply_residual_connection_post_layernorm logits_soft_cap output_logit_soft_cap scale_decoder_outputs",
    HEAD: "tie_word_embeddings",
    SHAPES: "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim v_head_dim qk_head_dim "
    "qk_nope_head_dim qk_rope_head_dim q_lora_rank kv_lora_rank intermediate_size moe_intermediate_size n_inner "
    "num_experts n_shared_experts num_shared_experts shared_expert_intermediate_size ffn_dim d_ff d_kv attention_bias "
    "mlp_bias qkv_bias use_bias bias no_bias num_nextn_predict_layers num_mtp_layers mtp_num_hidden_layers "
    "type_vocab_size embedding_size multi_query new_decoder_architecture is_decoder add_cross_attention "
    "is_encoder_decoder linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim "
    "linear_conv_kernel_dim mamba_d_state mamba_d_conv mamba_expand mamba_n_heads mamba_d_head mamba_n_groups "
    "state_size conv_kernel conv_L_cache shared_intermediate_size encoder_layers decoder_layers ffn_hidden_size "
    "encoder_ffn_dim decoder_ffn_dim encoder_attention_heads decoder_attention_heads depth num_heads patch_size "
    "global_head_dim num_global_key_value_heads in_channels num_channels out_hidden_size embed_dim",
    VOCABULARY: "vocab_size bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id "
    "mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id eod_token_id tokenizer_class "
    "vocab_size_per_layer_input unpadded_vocab_size additional_vocab_size model_max_length",
    NOTHING: "use_cache transformers_version architectures name_or_path dtype return_dict use_return_dict "
    "model_type auto_map id2label label2id num_labels problem_type task_specific_params finetuning_task prefix "
    "torchscript use_bfloat16 tf_legacy_loss pruned_heads tie_encoder_decoder chunk_size_feed_forward pretraining_tp "
    "gradient_checkpointing quantization_config compression_config attn_implementation experts_implementation "
    "router_aux_loss_coef aux_loss_alpha seq_aux router_z_loss_coef router_jitter_noise input_jitter_noise "
    "init_std embed_init_std resid_pdrop embd_pdrop attn_pdrop emb_pdrop encoder_layerdrop decoder_layerdrop "
    "layerdrop cross_attention_hidden_size num_logits_to_keep use_mamba_kernels mamba_chunk_size "
    "rescale_prenorm_residual time_step_min time_step_max time_step_floor time_step_init_scheme use_flash_attn "
    "use_flash_attention flash_attn init_device summary_type summary_use_proj summary_activation "
    "summary_proj_to_labels summary_first_dropout classifier_pooling classifier_bias classifier_activation "
    "save_safetensors rope_parameters layer_norm_elementwise_affine bad_words_ids begin_suppress_tokens "
    "diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty "
    "length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences remove_invalid_values repetition_penalty suppress_tokens temperature top_k top_p typical_p "
    "cache_implementation use_kernels kernel_config layer_drop deterministic_flash_attn max_sequence_length",
}
_EFFECTS = {key: effect for effect, keys in _KEYS.items() for key in keys.split()}
# Written by trainers and by transformers about itself.
_STARTS = ("_", "initializer_", "output_attentions", "output_hidden", "output_router", "unsloth", "mask_time", "mask_f")
_PARTS = ("dropout", "initializer")


def effect_of(key: str) -> str:
    """Return what a difference in `key` changes."""
    name = key.rpartition(".")[2]
    if name in _EFFECTS:
        return _EFFECTS[name]
    if name.startswith(_STARTS) or any(part in name for part in _PARTS):
        return NOTHING
    return UNKNOWN

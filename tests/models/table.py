"""What people train, case by case, and the tests that hold each case.

A verdict is `right` (against dense or finite-difference derivatives in float64), `right, by
differences` (with a note that says so), `right, with a note` on what the number is of, or
`refused` (in one line).
"""

from __future__ import annotations

from typing import NamedTuple

RIGHT, DIFFERENCES, REFUSED = "right", "right, by differences", "refused"
NOTED = "right, with a note"


class Case(NamedTuple):
    what: str
    verdict: str
    tests: tuple[str, ...]  # file::test, or file::test[with these in its parameters


def _case(what: str, verdict: str, *tests: str) -> Case:
    return Case(what, verdict, tests)


LIBRARIES, OWN, FORMS, TASKS, LOSSES, MORE_OBJECTIVES, REFUSALS, WRONG, BATCHES = (
    f"tests/models/test_{name}.py::test_"
    for name in (
        "libraries",
        "own",
        "forms",
        "tasks",
        "further_losses",
        "further_objectives",
        "refused_losses",
        "wrong_networks",
        "wrong_batches",
    )
)
WEIGHING = "tests/landscape/test_weighing.py::test_"
OBJECTIVES = "tests/landscape/test_objectives.py::test_"
TOKENS = "tests/landscape/test_token_objectives.py::test_"
CONSISTENCY = "tests/landscape/test_consistency.py::test_"
LANDSCAPE = "tests/landscape/test_landscape.py::test_"
LAYERS = "tests/landscape/derivatives/test_layers.py::test_"
PRODUCTS = "tests/landscape/derivatives/test_products.py::test_"
TRANSFORMERS = "tests/landscape/derivatives/test_transformer_layers.py::test_"
RULES = "tests/training/test_collection_rules.py::test_"
STABILITY = "tests/training/test_stability.py::test_"
PRECONDITIONED = "tests/probes/test_preconditioned.py::test_"
ADOPTION = "tests/studies/test_adoption.py::test_"
STEPS = "tests/training/test_objective_steps.py::test_"
PARTS = "tests/training/test_own_parts.py::test_"
NETWORK = OWN + "a_network_is_right_and_stays_as_it_was"

CASES = (
    # libraries
    _case("Hugging Face model as it is, dict batch", RIGHT,
          LIBRARIES + "language_models_by_their_own_loss_and_per_token",
          LIBRARIES + "classifiers_by_their_own_loss"),
    _case("Hugging Face BatchEncoding", RIGHT, LIBRARIES + "a_batch_encoding"),
    _case("Hugging Face output and a loss on its logits", RIGHT,
          LIBRARIES + "a_loss_of_ones_own_on_an_output"),
    _case("Mamba", RIGHT, LIBRARIES + "mamba"),
    _case("GPT-2, tied Llama (SDPA, rotary)", RIGHT,
          LIBRARIES + "language_models_by_their_own_loss_and_per_token"),
    _case("labels −100 of ragged length, more than one pass", RIGHT,
          LIBRARIES + "language_models_by_their_own_loss_and_per_token",
          TOKENS + "per_token_is_the_mean_over_all_tokens_however_they_are_cut"),
    _case("BERT, ViT", RIGHT, LIBRARIES + "classifiers_by_their_own_loss"),
    _case("LoRA on a frozen Llama", RIGHT, LIBRARIES + "the_adapters_of_a_frozen_model_alone"),
    _case("Mixtral", RIGHT, LIBRARIES + "a_mixture_of_experts"),
    _case("Llama with gradient checkpointing", RIGHT, LIBRARIES + "gradient_checkpointing"),
    _case("Hugging Face outputs without logits (question answering)", REFUSED,
          LIBRARIES + "an_output_without_logits_is_refused"),
    _case("timm vit, convnext", RIGHT, LIBRARIES + "timm"),
    _case("Lightning module by its training_step", RIGHT, LIBRARIES + "lightning"),
    _case("Lightning checkpoint; a probe in a callback of fit", RIGHT,
          LIBRARIES + "a_lightning_checkpoint_and_a_callback_in_fit"),
    # losses
    _case("weighted cross entropy", RIGHT,
          WEIGHING + "class_weights_and_ignored_classes_weigh_as_in_one_pass"),
    _case("dense cross entropy with ignore_index, uneven counts", RIGHT,
          WEIGHING + "tokens_that_are_ignored_leave_a_mean_over_the_others",
          TASKS + "segmentation_counts_the_pixels_that_are_not_ignored"),
    _case("one sample wholly ignored", RIGHT,
          WEIGHING + "tokens_that_are_ignored_leave_a_mean_over_the_others"),
    _case("no target that counts", REFUSED, WEIGHING + "no_weight_at_all_is_refused"),
    _case("label smoothing, NLL, probabilities as targets", RIGHT,
          WEIGHING + "nll_loss_and_probabilities_as_targets",
          WEIGHING + "class_weights_and_ignored_classes_weigh_as_in_one_pass"),
    _case("BCE (+ pos_weight), MSE, Huber, focal", RIGHT,
          WEIGHING + "means_over_samples_are_taken_as_they_are"),
    _case("MSE of (N, 1) against (N,); InfoNCE; a mask inside of the loss", REFUSED,
          WEIGHING + "what_is_no_mean_over_samples_is_refused_in_one_line",
          WEIGHING + "a_mask_inside_of_a_loss_is_seen_in_sorted_data"),
    _case("reduction sum, none", REFUSED, CONSISTENCY + "a_loss_that_is_no_mean_is_refused"),
    _case("penalty that closes over the model", REFUSED,
          WEIGHING + "a_penalty_that_closes_over_the_model_is_refused"),
    _case("penalty as Terms.penalty", RIGHT, OBJECTIVES + "a_penalty_counts_once"),
    _case("penalty as an output of the network", RIGHT,
          TASKS + "outputs_may_be_a_tuple_a_dictionary_and_a_number_for_all_samples"),
    _case("physics-informed, derivative in the forward", RIGHT, NETWORK + "[derivative in"),
    _case("physics-informed, derivative in the loss", RIGHT,
          OBJECTIVES + "physics_informed_losses_differentiate_by_the_inputs"),
    _case("InfoNCE as an objective", RIGHT,
          OBJECTIVES + "samples_that_interact_make_the_batch_the_unit"),
    _case("CTC", DIFFERENCES, FORMS + "a_connectionist_loss_by_differences"),
    _case("VAE that samples in eval, by draws", RIGHT,
          OWN + "a_variational_autoencoder_by_draws"),
    _case("functional dropout, by draws", RIGHT,
          OBJECTIVES + "draws_make_a_random_network_one_fixed_function"),
    _case("outputs as a tuple or dictionary", RIGHT,
          TASKS + "outputs_may_be_a_tuple_a_dictionary_and_a_number_for_all_samples"),
    *(_case(what, RIGHT, f"{TASKS}a_task_is_right[{name}]") for what, name in (
        ("DPO with a reference model", "preference"), ("pairs of a reward model", "rewards"),
        ("mixup with label smoothing", "soft_labels"), ("RNN-T", "transducer"),
        ("several tasks, weights learned", "two_tasks"), ("CLIP, two towers", "two_towers"),
        ("mixture of experts with a balance loss", "balanced_experts"),
        ("detection, a dictionary of losses", "boxes"), ("graph batches", "graphs"),
        ("MAML, a gradient by the parameters inside", "inner_step"),
    )),
    *(_case(what, RIGHT, f"{LOSSES}a_loss_of_tensors_is_right[{name}") for what, name in (
        ("knowledge distillation", "knowledge"), ("PPO", "policy gradient, clipped"),
        ("GRPO, a mean over sequences", "policy gradient, sequences"),
        ("quantile regression", "quantile"), ("BYOL", "two views"), ("triplets", "triplets"),
        ("seq2seq: label smoothing, ignore_index and class weights", "seq2seq"),
        ("a normalising flow", "a flow"), ("a neural ODE", "an ordinary"),
        ("a conditional random field; masks among the targets", "a conditional"),
        ("Gaussian NLL", "mean and variance"),
    )),
    *(_case(what, RIGHT, f"{MORE_OBJECTIVES}an_objective_is_right[{name}]") for what, name in (
        ("packed texts with position ids", "packed"),
        ("graphs as objects, pooled by index_add", "graph_objects"),
        ("masked language model, words hidden by draws", "masked_words"),
        ("WGAN-GP, by draws", "penalised_critic"), ("score matching", "scores"),
    )),
    _case("contrastive with a queue", RIGHT,
          LOSSES + "a_loss_of_tensors_is_right[contrastive",
          LOSSES + "a_queue_that_a_pass_writes_is_put_back_and_said"),
    _case("losses coupled over the batch (VICReg, Cox, hardest pairs, DAPO, mixup of targets); "
          "detached weights, VQ-VAE, hard Gumbel, one step from an equilibrium", REFUSED,
          REFUSALS + "what_is_no_landscape_is_refused_in_one_line"),
    _case("random numbers by draws in a layer that mixes samples", NOTED,
          MORE_OBJECTIVES + "with_draws_samples_that_a_layer_mixes_are_told_from_random_numbers"),
    _case("diffusion loss, by draws of time and noise", RIGHT,
          TASKS + "a_diffusion_loss_by_fixed_draws_of_time_and_noise"),
    _case("dice over the batch, a perceptual loss by a trained network, a detached target",
          REFUSED, TASKS + "what_cannot_be_made_right_is_refused_in_one_line"),
    # data
    _case("DataLoader, list, dict, NumPy, other mappings, iterable data sets", RIGHT,
          OBJECTIVES + "batches_of_any_kind_give_the_mean_over_all_samples"),
    _case("arrays, memory-mapped arrays", RIGHT, OBJECTIVES + "arrays_are_taken_like_tensors",
          FORMS + "a_memory_mapped_array_is_read_as_it_lies"),
    _case("several inputs", RIGHT, OBJECTIVES + "several_inputs_are_cut_into_batches"),
    _case("nested tensors in batches", RIGHT, FORMS + "nested_tensors_in_batches"),
    _case("sparse inputs in batches", RIGHT, FORMS + "sparse_inputs_in_batches"),
    _case("packed sequences", RIGHT, OWN + "packed_sequences"),
    _case("streaming: memory of 100,000 samples", RIGHT,
          "tests/landscape/test_streaming.py::test_the_peak_memory_of_100000_samples_is_that"),
    _case("data that change from one reading to the next", REFUSED,
          OBJECTIVES + "data_that_change_are_refused"),
    _case("numbers in batches that change; weights that only later batches show", REFUSED,
          BATCHES + "numbers_in_batches_that_change_are_refused",
          BATCHES + "a_weighing_that_only_later_batches_show_is_refused"),
    _case("Terms that do not fit: weights with θ inside, a detached total, a mean for a sum",
          REFUSED, BATCHES + "terms_that_do_not_fit_together_are_refused"),
    _case("samples that a layer mixes, in batches; drop_last, replacement", NOTED,
          BATCHES + "samples_that_a_layer_mixes_are_noted_in_batches",
          BATCHES + "what_a_loader_leaves_out_or_repeats_is_noted"),
    _case("class weights or ignored labels in a training_step", NOTED,
          BATCHES + "a_loss_of_batches_that_is_no_sum_over_their_parts_is_noted"),
    _case("an empty batch; a batch without a label that counts", REFUSED,
          BATCHES + "a_batch_that_has_no_loss_is_named"),
    _case("Terms.outputs that are not what the loss is computed from", NOTED,
          BATCHES + "outputs_that_the_loss_is_not_computed_from_have_no_gauss_newton_part"),
    # precision and packaging
    _case("float16, bfloat16", RIGHT, FORMS + "probes_of_a_network_in_half_precision",
          OWN + "half_precision_is_measured_as_the_network_computes[bfloat16]"),
    _case("autocast inside of the forward", RIGHT,
          OWN + "half_precision_is_measured_as_the_network_computes[autocast]"),
    _case("FFT inside", RIGHT, FORMS + "a_fourier_transform_inside"),
    _case("complex, int8 and float8 parts that are frozen", RIGHT,
          FORMS + "frozen_parts_may_be_complex_or_of_8_bits"),
    _case("torch.compile, DataParallel", RIGHT, OWN + "wrappers_are_taken_off"),
    _case("DDP (one process)", RIGHT, FORMS + "ddp_in_one_process"),
    _case("torch.export", RIGHT, FORMS + "an_exported_program"),
    _case("scripted, lazy, complex parameters", REFUSED,
          OWN + "networks_without_a_theta_are_refused_in_one_line"),
    _case("quantized, meta device, float8 parameters, batch norm kept in train()", REFUSED,
          FORMS + "forms_without_a_landscape_are_refused_in_one_line"),
    # layers
    *(_case(what, RIGHT, f"{NETWORK}[{name}-") for what, name in (
        ("LSTM", "LSTM"), ("GRU", "GRU"), ("RNN", "RNN"),
        ("sparse embedding", "sparse embedding"),
        ("torch.utils.checkpoint", "activation checkpointing"),
        ("mixture of experts with nonzero", "mixture of experts"),
        ("convolutions that end in x.view(len(x), -1)", "view after convolutions"),
        ("in-place on the input", "in-place on the input"),
        ("a counter buffer", "counter buffer"), ("a transformer layer", "transformer layer"),
    )),
    _case("EmbeddingBag", DIFFERENCES, OWN + "an_embedding_bag_is_measured_by_differences"),
    _case("max_norm that holds", RIGHT, OWN + "max_norm_that_holds_is_left_out_of_the_loss"),
    _case("padding_idx, pad tokens averaged in", RIGHT,
          OWN + "options_of_an_embedding_are_none_of_the_loss"),
    _case("batch norm in eval", RIGHT,
          LAYERS + "batch_norm_and_dropout_make_one_fixed_function"),
    _case("batch norm without statistics", REFUSED,
          LANDSCAPE + "batch_norm_without_statistics_is_refused"),
    _case("custom Function without a second derivative", DIFFERENCES,
          OWN + "a_kernel_without_second_derivatives_is_measured_by_differences"),
    _case("custom Function with wrong derivatives", REFUSED,
          CONSISTENCY + "wrong_derivatives_are_refused_in_one_line"),
    _case("hard sigmoids, as in MobileNetV3", RIGHT,
          TRANSFORMERS + "both_derivatives_are_those_of_differences[hard sigmoid",
          TRANSFORMERS + "hard_sigmoid_and_its_gradient_are_torchs"),
    _case("operations in place behind a linear layer or attention", RIGHT,
          TRANSFORMERS + "outputs_may_be_changed_in_place"),
    _case("a linear layer of a single vector (hypernetworks)", RIGHT,
          TRANSFORMERS + "values_and_both_derivatives_are_torchs[linear, no batch"),
    _case("queries that see no key", RIGHT,
          TRANSFORMERS + "values_and_both_derivatives_are_torchs[attention with queries"),
    _case("a tensor that is changed after its use", REFUSED,
          PRODUCTS + "a_tensor_that_is_changed_after_its_use_is_no_wrong_product"),
    _case("cdist, grid_sample: no forward mode", RIGHT,
          WRONG + "an_operation_without_forward_mode_has_curvatures_of_samples"),
    _case("straight-through gradients", REFUSED,
          FORMS + "straight_through_gradients_are_not_those_of_the_loss"),
    _case("in-place operations, hooks, shared, frozen, unused, strided parameters", RIGHT,
          FORMS + "in_place_operations_hooks_shared_unused_and_strided_parameters"),
    _case("spectral_norm, orthogonal", RIGHT, FORMS + "parametrized_weights"),
    _case("weight_norm", RIGHT, FORMS + "weight_norm_has_right_second_derivatives"),
    _case("ensemble by torch.func.vmap", RIGHT,
          FORMS + "an_ensemble_by_vmap_and_a_functional_network"),
    _case("a view of a weight that is kept; two parameters in one memory; a limit on a norm in the "
          "forward pass; a forward or hook that calls another network; a state between passes",
          REFUSED, WRONG + "a_network_that_is_no_function_of_theta_is_refused_in_one_line"),
    _case("parameters without influence: adapters that eval() merges, kept weights", NOTED,
          WRONG + "parameters_without_influence_are_named"),
    _case("experts without samples, pruned and parametrized weights", RIGHT,
          WRONG + "experts_that_other_samples_take_are_not_without_influence",
          WRONG + "hooks_that_compute_a_weight_anew_are_no_views"),
    _case("parameters in float32 and float64", RIGHT, WRONG + "parameters_of_two_precisions"),
    _case("torch.func within the network", RIGHT,
          WRONG + "a_network_that_calls_torch_func_itself_has_per_sample_gradients"),
    _case("parameters by name, glob, predicate; no copy", RIGHT,
          OWN + "parameters_by_name_glob_or_predicate",
          OWN + "without_a_copy_the_callers_network_is_as_before"),
    # optimizers and checkpoints
    _case("AdaBelief, Prodigy, Adafactor, SOAP, Shampoo, schedule-free: thresholds", RIGHT,
          RULES + "steps_below_the_threshold_converge_and_above_it_diverge"),
    _case("Sophia: threshold", RIGHT, RULES + "sophia_diverges_at_its_threshold",
          RULES + "the_last_step_of_a_diagonal_rule_is_its_average_over_the_preconditioner"),
    _case("other optimizers, and options without a linear step (cautious, adanorm)", REFUSED,
          RULES + "others_of_a_collection_name_the_way_to_register_them",
          RULES + "options_without_a_linear_step_are_said_in_one_line"),
    _case("Shampoo with momentum", RIGHT,
          RULES + "shampoo_with_momentum_diverges_at_its_threshold_where_curvature_turns"),
    _case("SOAP with merge_dims", RIGHT,
          RULES + "the_last_step_is_the_rate_times_the_average_over_the_preconditioner"),
    _case("Muon (lsa's, torch's, of pytorch_optimizer): threshold", RIGHT,
          "tests/training/test_muon_state.py::test_real_steps_below_the_threshold_converge_and"),
    _case("LARS, Lamb, momentum that Shampoo feeds back too strongly", REFUSED,
          RULES + "steps_of_one_length_have_no_threshold_and_say_so_in_one_line",
          RULES + "momentum_that_shampoo_feeds_back_too_strongly_is_said"),
    _case("Lion", REFUSED, RULES + "lion_has_no_threshold_and_says_so_in_one_line"),
    _case("optimizers of torch: thresholds", RIGHT,
          STABILITY + "steps_below_the_threshold_converge_and_above_it_diverge"),
    _case("SAM, Rprop, LBFGS: no preconditioner", REFUSED,
          PRECONDITIONED + "without_a_preconditioner_the_other_numbers_remain"),
    _case("a live optimizer, groups with rates of their own", RIGHT,
          PRECONDITIONED + "a_live_optimizer_with_groups_of_their_own_rates_has_the_threshold"),
    _case("an optimizer over unfrozen parameters only", RIGHT,
          PRECONDITIONED + "frozen_parts_and_parameters_outside_of_the_optimizer_stand_still"),
    _case("an AdamW subclass", RIGHT,
          PRECONDITIONED + "a_derived_class_is_read_as_its_base_and_a_step_of_its_own_is_said"),
    _case("optimizers in wrappers of Lightning and Accelerate", RIGHT,
          LIBRARIES + "wrapped_optimizers_are_looked_into"),
    _case("schedule-free in training", RIGHT,
          PARTS + "an_optimizer_is_switched_between_training_and_evaluation"),
    _case("YAML: own loss, data set, schedule, clipping, EMA", RIGHT,
          PARTS + "a_regression_of_ones_own_trains_by_name_and_has_no_accuracy",
          PARTS + "a_schedule_of_ones_own_counts_steps_and_takes_a_warm_up",
          PARTS + "a_clipped_step_is_no_longer_than_the_limit",
          PARTS + "averaged_weights_are_what_is_kept_and_training_goes_on_from_the_others"),
    _case("YAML: an objective, a language model by per_token", RIGHT,
          STEPS + "an_epoch_is_that_of_a_loop_by_hand",
          STEPS + "a_language_model_of_a_project_is_trained"),
    _case("YAML: a Hugging Face model as it is", RIGHT,
          STEPS + "a_hugging_face_model_of_a_project_is_trained_by_its_own_loss"),
    _case("YAML: timm through a factory", RIGHT,
          "tests/models/test_projects.py::test_a_model_of_timm_is_trained_by_a_project_and_measured"),
    _case("own checkpoint: a Hugging Face folder with tied weights", RIGHT,
          ADOPTION + "a_folder_of_hugging_face_is_adopted_with_its_tied_weights"),
    _case("YAML: a watch in a training by an objective", RIGHT,
          STEPS + "a_watch_of_a_training_by_an_objective_measures_the_loss_of_all_batches"),
    _case("an adopted run: mlflow run, layers, interpolation, a study, by commands", RIGHT,
          *(f"tests/studies/test_adopted_commands.py::test_{name}" for name in (
              "mlflow_run_measures_an_adopted_run", "layers_of_an_adopted_run_by_a_command",
              "two_adopted_runs_are_joined_by_a_command", "a_study_of_adopted_runs_by_a_command",
          ))),
    _case("own checkpoint: weights of another precision than the data", REFUSED,
          ADOPTION + "weights_of_another_precision_than_the_data_are_refused"),
    _case("own checkpoint: .pt, .safetensors, .ckpt, folder, MLflow model", RIGHT,
          ADOPTION + "each_kind_of_file_is_adopted"),
)  # fmt: skip

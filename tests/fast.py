"""What `make test-fast` leaves out, by the marker `slow`: tests that take seconds of their own, and of a test over many
families, formats or models all but each 30th case. So every kind of test still runs.
"""

from collections import Counter

import pytest

SLOW = (
    "tests/cli/test_doctor.py::test_a_sound_machine_is_measured_and_passes",
    "tests/cli/test_doctor.py::test_every_wrong_setting_is_a_problem_and_stops_nothing",
    "tests/cli/test_doctor.py::test_gpus_are_listed",
    "tests/cli/test_doctor.py::test_settings_that_slow_the_machine_are_notes",
    "tests/cli/test_kt.py::test_chat_answers_a_prompt_with_the_embedded_model",
    "tests/cli/test_messages.py::test_a_session_at_a_terminal",
    "tests/cli/test_plan_cli.py::test_a_plot_is_written_or_the_missing_library_is_named",
    "tests/cli/test_plan_cli.py::test_this_machine_is_measured_without_flags",
    "tests/cli/test_plan_cli.py::test_what_does_not_fit_has_exit_code_1_and_says_what_would",
    "tests/cli/test_quantize.py::test_the_module_that_scripts_know",
    "tests/engine/test_disk_blocks.py::test_a_writer_that_is_killed_leaves_whole_blocks",
    "tests/engine/test_disk_blocks.py::test_two_processes_and_a_reader_use_one_folder",
    "tests/engine/test_load.py::test_the_engine_imports_no_terminal",
    "tests/gguf_files/test_llama_cpp.py",
    "tests/gguf_files/test_lora_llama_cpp.py",
    "tests/kernels/test_compiled.py",
    "tests/kernels/test_compiled_attention.py",
    "tests/machine/test_hardware.py::test_a_gpu_that_cannot_be_measured_is_taken_for_a_known_one",
    "tests/machine/test_hardware.py::test_this_machine_is_measured_in_sane_figures",
    "tests/models/test_known.py::test_every_known_config_is_built_in_a_process_that_has_loaded_nothing_else",
    "tests/native/test_aarch64.py::test_every_format_on_every_rung",
    "tests/native/test_native.py::test_fork",
    "tests/native/test_native.py::test_import_starts_nothing",
    "tests/native/test_threads.py",
    "tests/operators/test_compile.py",
    "tests/operators/test_every_multimodal.py::test_the_program_takes_such_a_folder",
    "tests/operators/test_gpu_attention.py::test_generating_with_sequences_of_different_lengths",
    "tests/operators/test_gpu_attention.py::test_latents_in_fp8_and_what_that_changes",
    "tests/operators/test_gpu_attention.py::test_turns_of_a_conversation_by_one_graph",
    "tests/operators/test_packed_gpu.py::test_a_model_by_a_rule_file_says_the_same_tokens",
    "tests/planner/test_plan.py::test_a_gguf_or_a_folder_with_weights_is_planned_by_its_own_headers",
    "tests/planner/test_plan.py::test_a_gguf_on_gpus_is_planned_as_simulated",
    "tests/planner/test_plan.py::test_what_cannot_fit_at_all_is_said",
    "tests/planner/test_plan.py::test_what_is_planned_on_gpus_is_what_a_simulation_finds_there",
    "tests/planner/test_plan.py::test_what_is_proposed_to_fit_is_placed_by_its_own_sizes",
    "tests/planner/test_sizes.py::test_a_named_gguf_format_has_the_bytes_that_quantize_writes",
    "tests/server/test_conformance.py",
    "tests/server/test_page.py",
    "tests/server/test_sockets.py::test_a_thousand_at_once_are_answered_or_told_to_come_again",
    "tests/server/test_sockets.py::test_signals",
    "tests/simulator/test_simulate.py::test_packaged_rules_run_on_any_number_of_gpus",
    "tests/simulator/test_simulate.py::test_packed_weights_on_the_cpu_are_counted_packed",
    "tests/simulator/test_simulate.py::test_the_command_prints_tables_or_json_and_exits_with_1_on_a_problem",
    "tests/test_docs.py",
    "tests/test_embedded_model.py::test_it_answers_nine_of_ten",
    "tests/test_local_chat.py::test_a_full_disk_below_standard_output_is_one_error",
    "tests/test_local_chat.py::test_a_prompt_file_is_answered_once",
    "tests/test_local_chat.py::test_each_line_of_a_pipe_is_answered",
    "tests/test_local_chat.py::test_stray_bytes_and_a_closed_input_are_no_disaster",
    "tests/test_optimize.py::test_importing_starts_nothing",
    "tests/test_packaging.py::test_a_plain_checkout_works_once_the_library_is_built_in_place",
    "tests/test_packaging.py::test_a_wheel_built_from_the_sdist_is_complete",
)
"""Beginnings of test ids."""

EVERY = 30


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark what the table names, and of each test's cases all but the first of each EVERY."""
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.split("[")[0]
        seen[test] += 1
        if test.startswith(SLOW) or seen[test] % EVERY != 1:
            item.add_marker(pytest.mark.slow)

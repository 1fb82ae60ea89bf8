"""Continue the pretraining of a vision encoder with E2MC, or without it as the control.

  python scripts/continue_pretrain.py [RECIPE] --model resnet18 --dataset ./photos --output_dir runs/mine
  torchrun --nproc_per_node 2 scripts/continue_pretrain.py recipe.yaml --use_cpu

RECIPE is a YAML file with the options below by name, or one of the package's own (swav-800-e2mc, dinov2-vits14, ...:
see e2mc_hf/recipes); flags override it.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from e2mc_hf.arguments import (
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    RegularizerArguments,
    RunArguments,
    ViewArguments,
    require,
)
from e2mc_hf.command_line import Options, build_parser, one_line_errors, read_options, recipe_text, refuse_unknown, take
from e2mc_hf.recipe_files import find_recipe

if TYPE_CHECKING:
    from e2mc_hf.models.ssl_model import SSLModel

GROUPS = {
    "encoder": ModelArguments,
    "objective": ObjectiveArguments,
    "regularizer": RegularizerArguments,
    "images": DataArguments,
    "views": ViewArguments,
    "run": RunArguments,
}
EPILOG = "Any other field of transformers.TrainingArguments is a flag by its name, such as --save_steps 500."


def parse(argv: list[str] | None) -> Options:
    """Options of the recipe and the command line; answers --help before anything heavy is imported."""
    parser = build_parser(__doc__, GROUPS, EPILOG)
    words = sys.argv[1:] if argv is None else argv
    recipe = words[0] if words and not words[0].startswith("-") else None
    namespace, rest = parser.parse_known_args(words[1:] if recipe else words)
    return read_options(namespace, GROUPS, str(find_recipe(recipe)) if recipe else None, rest)


def run(options: Options) -> None:
    """Load everything, then train, export and write down what was done; nothing is written before the training."""
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    from e2mc_hf.data.contact_sheet import write_contact_sheet
    from e2mc_hf.data.dataset import ViewDataset
    from e2mc_hf.data.sources import load_images
    from e2mc_hf.data.views import ViewTransform
    from e2mc_hf.models.starting_point import has_heads, load_starting_point, objective_of
    from e2mc_hf.objectives.registry import check_views, objective_kind
    from e2mc_hf.training.arguments import E2MCTrainingArguments
    from e2mc_hf.training.continuation import continue_pretraining
    from e2mc_hf.training.earlier_run import remove_earlier_run
    from e2mc_hf.training.launch import check_world
    from e2mc_hf.training.momentum import read_momentum
    from e2mc_hf.training.stopping import undisturbed_exit

    disable_progress_bar()  # those of loading and saving; the training keeps its own
    refuse_unknown(options, [*GROUPS.values(), E2MCTrainingArguments])
    given = dict(options)
    if options.get("show_views") is not None:
        options.setdefault("output_dir", str(Path(str(options["show_views"])).parent))  # nothing else is written
    start, objective = take(options, ModelArguments), take(options, ObjectiveArguments)
    data, views = take(options, DataArguments), take(options, ViewArguments)
    training = take(options, E2MCTrainingArguments)
    check_world(training.world_size, on_cpu=training.device.type == "cpu")
    evaluation = str(training.eval_strategy.value)
    require(evaluation == "no", "eval_strategy", "must be no", evaluation, "Evaluate the encoder with evaluate.py.")
    require(not training.eval_on_start, "eval_on_start", "must be off", True, "Evaluate the encoder with evaluate.py.")
    output_dir = training.checked_output_dir() if views.show_views is None else Path(views.show_views)

    set_seed(training.seed)
    method = objective_of(start.model, objective.objective, from_scratch=start.from_scratch)
    views = views.resolved(objective_kind(method).default_small_views)
    check_views(method, views.num_views, views.num_small_views or 0)
    model = load_starting_point(
        start.model,
        revision=start.model_revision,
        from_scratch=start.from_scratch,
        backbone_args=start.backbone_args,
        objective=method,
        objective_args=objective.objective_args,
        image_size=views.image_size,
        other_sizes=[views.small_image_size] if views.num_small_views else [],
    )
    source = load_images(data, data.train_split)
    dataset = ViewDataset(
        source,
        ViewTransform(views, model.backbone.image_settings),
        seed=training.seed,
        shuffle_window=data.shuffle_window,
        lanes=data.lanes,
        max_unreadable_share=data.max_unreadable_share,
    )
    for row in dataset.first_rows(1):
        dataset[row]  # a view that cannot be drawn shows before anything is written
    if views.show_views is not None:
        if training.should_save:
            print(f"Views: {write_contact_sheet(dataset, views.show_views)}")
        return
    momentum = read_momentum(start.model) if training.restore_momentum else None

    def replace_run() -> None:
        if training.overwrite and training.should_save:
            remove_earlier_run(output_dir)

    new_heads = not has_heads(start.model, from_scratch=start.from_scratch) and not start.from_scratch
    with undisturbed_exit():
        trained, trainer = continue_pretraining(
            model, training, dataset, new_heads=new_heads, momentum=momentum, before_training=replace_run
        )
    if trainer.is_world_process_zero():
        finish(trained, trainer.state.log_history, output_dir, given)
    trainer.accelerator.end_training()
    trainer.refuse_failed_save()


def finish(model: "SSLModel", log: list[dict[str, float]], output_dir: Path, given: Options) -> None:
    """Write model, encoder, log and recipe."""
    from e2mc_hf.publishing.encoder import export_encoder
    from e2mc_hf.training.saved_arguments import without_secrets

    model.save_pretrained(output_dir)
    (output_dir / "log.json").write_text(json.dumps(log, indent=1))
    shown = without_secrets(given)
    (output_dir / "recipe.yaml").write_text(recipe_text(shown))
    if shown != given:
        print("recipe.yaml leaves out what must not be shown: tokens; user, password, query and fragment of a URL.")
    difference = export_encoder(model.backbone, output_dir / "encoder")
    print(f"Encoder: {output_dir / 'encoder'}; reloaded, its features differ by at most {difference:.1e}.")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    with one_line_errors():
        run(parse(argv))


if __name__ == "__main__":
    main()

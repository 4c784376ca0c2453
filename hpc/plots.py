"""Pictures of a run."""

from pathlib import Path

from hpc.metrics import read_metrics

SHUFFLED_COLOUR, REAL_COLOUR, TRAINING_COLOUR = "0.6", "tab:blue", "tab:orange"


def plot_loss(run_dir: Path, picture: Path) -> None:
    """Draw training and held-out loss over the steps.

    Args:
        run_dir: run with a metrics.jsonl.
        picture: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = read_metrics(run_dir)
    training = [line for line in metrics if "train/loss" in line]
    held_out = [line for line in metrics if "eval/loss" in line]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(
        [line["step"] for line in training],
        [line["train/loss"] for line in training],
        color=TRAINING_COLOUR,
        label="training (80/10/10 masking)",
    )
    for name, colour, label in (
        ("eval/loss_shuffled", SHUFFLED_COLOUR, "held out, residues shuffled ([MASK] only)"),
        ("eval/loss", REAL_COLOUR, "held out ([MASK] only)"),
    ):
        axes.plot(
            [line["step"] for line in held_out],
            [line[name] for line in held_out],
            color=colour,
            marker="o",
            label=label,
        )
    if held_out:
        last = held_out[-1]
        axes.annotate(
            f"learned {last['eval/learned']:.2f} ± {last['eval/learned_se']:.2f} nats",
            (last["step"], (last["eval/loss"] + last["eval/loss_shuffled"]) / 2),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        )
        axes.vlines(last["step"], last["eval/loss"], last["eval/loss_shuffled"], linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per target residue")
    axes.set_title(run_dir.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)

"""Help texts of the commands. `{command}` stands for what is typed to call this program."""

from leap_dist.config.presets import PRESET_HELP

MAIN = """\
Meta-learn initializations with Leap, on Atari games, Omniglot or Multi-CV.

{command} train --preset quick                                  three Atari games on this machine, a few minutes
{command} train --help                                          every setting, with its default
{command} evaluate --init runs/demo --init scratch              does it help, on games it never saw?
{command} study --tasks omniglot --out studies/omniglot         compare all meta-learners on alphabets
{command} status --run-dir runs/demo                            state of a run
{command} export --init runs/demo/init.safetensors --to sb3 --out policy
    (writes the initialization for another library)
"""

TRAIN = """\
Meta-train an initialization: workers learn Atari games from it, and the server pulls it forward along their paths.

examples:
  {command} train --preset quick
  {command} train --preset fast --games pong,freeway --workers 4 --run-dir runs/mine
  {command} train --preset paper --address auto --run-dir /shared/leap      (on a running Ray cluster)
  {command} train --preset fast --run-dir s3://bucket/mine                  (kept in object storage)
  {command} train --run-dir runs/mine --resume --meta-updates 200

presets:
""" + "".join(f"  {name:<10} {text}\n" for name, text in PRESET_HELP.items())

EVALUATE = """\
Train new agents from each initialization, on the same games with the same seeds, and compare how they learn.

examples:
  {command} evaluate --init runs/mine --init scratch --out reports/mine
  {command} evaluate --init leap=runs/a --init tuned=runs/b/init.safetensors --init scratch \\
      --games breakout,qbert --seeds 3 --steps 200000 --out reports/three

The agents get the settings of the run of the first --init, unless --preset, --config or flags say otherwise. The same
command continues an interrupted evaluation; with other initializations or games, or more seeds, it adds to the results.
"""

STUDY = """\
Meta-train with every meta-learner on the same tasks and budget, and test each initialization on held-out tasks.

examples:
  {command} study --tasks omniglot --data-dir data --out studies/omniglot
  {command} study --tasks omniglot --arms leap reptile none --groups 10 20 --meta-updates 50 --out studies/small
  {command} study --tasks multi-cv --games mnist notmnist cifar10 --arms leap none --out studies/multi-cv
  {command} plot --run-dir studies/omniglot              (tables and figures of the results so far)

The same command continues an interrupted study; with other arms or groups, or more seeds, it adds to the results.
Several processes may work on one study.
"""

EXIT_CODES = """\
exit codes: 0 done; 1 training could not go on (the summary has the reason); 2 bad input, nothing was started;
            130 interrupted by SIGINT or SIGTERM, everything accepted is saved: continue with --resume
"""

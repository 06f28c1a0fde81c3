# Sourced by `mlflow run` before `conda activate`: the current environment is the one to use.
conda() { :; }

# Sourced by `mlflow run` in the shell that goes on to `conda activate` and `python -m lsa`.
conda() {
  echo "lsa: no conda here; using the current Python, ${LSA_PYTHON:-python}" \
    "(LSA_CONDA_STANDIN=off turns this off)" >&2
}
# The Python that runs MLflow, on PATH or not; `exec`, so that a signal to the shell reaches it.
python() { exec "${LSA_PYTHON:-python}" "$@"; }

"""The names of quantities in words, as axes, tables and findings say them."""

from __future__ import annotations

QUANTITIES = {
    "final/val_accuracy": "validation accuracy",
    "final/train_loss": "train loss",
    "lambda_max": "largest curvature λ_max",
    "lambda_min": "lowest curvature λ_min",
    "condition_number": "|λ_max/λ_min|",
    "trace": "trace of the Hessian",
    "n_outliers": "number of eigenvalues above the bulk",
    "lambda_h": "largest curvature λ_H",
    "lambda_c": "largest gradient noise λ_C",
    "noise_ratio": "noise over curvature λ_C/λ_H",
    "noise_scale": "noise scale (samples)",
    "curvature_fit": "fitted curvature",
    "asymmetry": "asymmetry of the valley",
    "loss_rise": "rise of the loss at ε*",
    "rise_at_step": "rise of the loss at the same step",
    "threshold_ratio": "share of the stability threshold",
    "batch_sharpness": "batch sharpness",
    "update_curvature": "curvature along the next step",
    "worst_case": "worst rise of the loss",
    "average_case": "mean rise of the loss",
    "adaptive_worst_case": "worst relative rise",
    "adaptive_average_case": "mean relative rise",
    "block_lambda_max": "largest curvature of a layer",
    "block_share": "share of the sharpest layer",
    "d90": "intrinsic dimension d₉₀",
    "accuracy_at_d": "accuracy in d dimensions",
    "gradient_norm": "norm of the gradient",
    "update_angle": "angle of step and gradient",
    "alpha_min": "place of the lowest loss",
    "barrier": "barrier",
    "interpolation/barrier": "barrier on the straight line",
    "interpolation/barrier_aligned": "barrier after aligning units",
    "auto_neb/barrier": "barrier on the path found",
    "auto_neb/path_loss": "highest loss on the path found",
    "lambda_max_rescaled_layers": "λ_max after rescaling layers",
    # curves
    "density": "density of the eigenvalues",
    "hessian_eigenvalue": "eigenvalue of the Hessian",
    "covariance_eigenvalue": "eigenvalue of the gradient noise",
    "raw_eigenvalue": "eigenvalue of the Hessian",
    "preconditioned_eigenvalue": "curvature that the optimizer feels",
    "loss_along_top": "rise of the loss",
    "accuracy": "accuracy",
    "lambda_max_of_block": "largest curvature of the layer",
    "share_of_layer": "share of the squared gradient",
    "adaptive_rise_along_worst": "rise of the loss",
}
AXES = {
    "index": "number of the eigenvalue, the largest first",
    "block": "layer, from input to output",
    "layer": "layer, from input to output",
    "d": "dimensions that are trained",
    "alpha": "position on the line (0: first checkpoint, 1: second)",
    "fraction": "share of the way",
    "relative_eigenvalue": "eigenvalue over the largest |λ|",
    "relative_epsilon": "step over ε*, where a parabola rises by 1",
    "relative_distance": "share of the way to the worst point found",
    "relative_position": "position on the axis",
}
COUNTS = {"index", "block", "layer"}  # axes that have whole numbers alone


def quantity(name: str) -> str:
    """A number or curve by its full name, `lanczos/lambda_max`, or by its own."""
    short = name.rpartition("/")[2]
    return QUANTITIES.get(name) or QUANTITIES.get(short) or short.replace("_", " ")


def short(name: str, most: int = 32) -> str:
    """A name that leaves room in a figure: of a long one both ends."""
    end = most // 3
    return name if len(name) <= most else f"{name[: most - end - 1]}…{name[-end:]}"


def axis(name: str) -> str:
    """Label of a curve's x axis."""
    return AXES.get(name, name.replace("_", " "))

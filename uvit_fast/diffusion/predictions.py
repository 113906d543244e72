"""What a network predicts: y = p x_0 + q eps, where p and q depend on the noise level.

Together with x_t = alpha x_0 + sigma eps these are two equations in x_0 and eps, with determinant alpha q - sigma p.
One conversion, their solution, serves every solver with every prediction; where the determinant is 0, as for eps in
pure noise, y does not determine x_0 and eps.
"""

from typing import Any

DATA, NOISE, VELOCITY = (
    (1.0, 0.0),
    (0.0, 1.0),
    (-1.0, 1.0),
)  # coefficients of x_0 and eps: what a solver needs; d x_t / dt is the linear path's


class Prediction:
    """Base class; a prediction defines `parts`. Levels are numbers, NumPy arrays or tensors."""

    def parts(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """Return p and q; a part that is the same at every level is a number."""
        raise TypeError("a prediction defines its parts")

    def determinant(self, alpha: Any, sigma: Any) -> Any:
        p, q = self.parts(alpha, sigma)
        return alpha * q - sigma * p

    def convert(self, wanted: tuple[float, float], alpha: Any, sigma: Any) -> tuple[Any, Any]:
        """Return the factors of the state x_t and of the network's output that give wanted[0] x_0 + wanted[1] eps."""
        p, q = self.parts(alpha, sigma)
        determinant = alpha * q - sigma * p
        data, noise = wanted
        return (data * q - noise * p) / determinant, (noise * alpha - data * sigma) / determinant


class Noise(Prediction):
    """eps, the paper's (Ho et al. 2020)."""

    def parts(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return NOISE


class Data(Prediction):
    """x_0."""

    def parts(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return DATA


class V(Prediction):
    """v = alpha eps - sigma x_0 (Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion
    Models", Section 4).
    """

    def parts(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return -sigma, alpha


class Velocity(Prediction):
    """The velocity d x_t / dt of the linear path: eps - x_0 where time runs towards the noise (Esser et al. 2024, SD3),
    or x_0 - eps where it runs towards the data (Ma et al. 2024, SiT).
    """

    def __init__(self, to_data: bool = False):
        self.constant = (1.0, -1.0) if to_data else VELOCITY

    def parts(self, alpha: Any, sigma: Any) -> tuple[Any, Any]:
        return self.constant

"""Steps, studies, the engines that run them, and forecasts of their cost."""

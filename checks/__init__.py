"""What a run knows about itself: proof that FP8 is on, telemetry, estimates of cost, timings of layers."""

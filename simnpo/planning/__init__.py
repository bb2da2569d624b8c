"""What a run will take before it starts: peak memory and time by part, and the settings that fit."""

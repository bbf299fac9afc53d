"""What every part of ScaleDown shares: command lines, recipes, devices, files, prompts and metrics of answers."""

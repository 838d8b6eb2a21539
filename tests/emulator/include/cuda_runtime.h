// Stands in for NVIDIA's header of this name: the emulator header has its contents.
#pragma once
#include "cuda_emulator.h"

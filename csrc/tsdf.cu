// Fusion of depth maps on CUDA. A thread keeps a short run of voxels along z in registers over all views, so that
// nothing but the result is written; the threads of a warp lie side by side in x and y, where orbit cameras see them
// in few rows of pixels.
#include "cuda_launch.h"
#include "tsdf_arguments.h"

namespace sv3d::tsdf {
namespace {

constexpr int RUN = 8;             // voxels along z: a whole 32-byte sector
constexpr int SIDE_X = 16, SIDE_Y = 8;  // threads of a block; a warp is 16 by 2... see fuse_run

}  // namespace
}  // namespace sv3d::tsdf

"""For `DiffusionPipeline.from_pretrained(folder, custom_pipeline="sv3d_fast_pipeline.py", trust_remote_code=True)`.

Current versions of diffusers ask for `trust_remote_code` before they run a pipeline's file, a local one too.
"""

from sv3d_fast.stable_video_3d import StableVideo3DPipeline

__all__ = ["StableVideo3DPipeline"]

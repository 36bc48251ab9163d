from sv3d_fast.frontends.comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]

"""How an engine's own loader gets a shard: vLLM, SGLang, transformers, Ray Serve.

options             what an engine's configuration says of a shard set
shardview           a window of a tensor: view operations move it, anything outside raises
shardtensor         a torch tensor that has the full shape and holds one block
vllm_loader         vLLM's load format `shardprep`; vllm_plugin registers it
sglang_plugin       the same for SGLang
ray_llm             ray.serve.llm with a shard set
transformers_state  a state for transformers' own tensor parallel models
quiet               transformers' progress bars and warnings, silenced in one place
"""

"""Give a shard to an engine's own loader: vLLM's, SGLang's, transformers' or that of Ray Serve.

options             what an engine's configuration says of a shard set
shardview           slices of full tensors that hold one rank's block; anything outside it raises
shardtensor         torch tensors of full shape that hold one rank's block
vllm_loader         vLLM's load format `shardprep`; vllm_plugin registers it
sglang_plugin       the same for SGLang
ray_llm             ray.serve.llm with a shard set
transformers_state  a state for transformers' own tensor parallel models
quiet               switches off transformers' progress bars and warnings
"""

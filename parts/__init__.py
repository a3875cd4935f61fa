"""Parts of other systems than LLaVA. build.build puts together the model that a config describes."""

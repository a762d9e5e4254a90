"""Setup text to copy for clients without a configuration file; it never contains a key."""

from router.clients.target import NO_KEY, Model, Target


def open_webui_text(target: Target, model: Model) -> str:
    """Return the environment variables of Open WebUI."""
    del model
    return (
        f"export OPENAI_API_BASE_URL={target.base_url}\n"
        f"export OPENAI_API_KEY={_key(target)}\n"
        "export ENABLE_OLLAMA_API=False"
    )


def openai_text(target: Target, model: Model) -> str:
    """Return the environment variables that OpenAI's SDKs for Python and Node.js read."""
    return (
        f"export OPENAI_BASE_URL={target.base_url}\n"
        f"export OPENAI_API_KEY={_key(target)}\n"
        f"# model: {model.id}"
    )


def langchain_text(target: Target, model: Model) -> str:
    """Return a code snippet for langchain-openai."""
    key = 'os.environ["IMPETUS_API_KEY"]' if target.key else f'"{NO_KEY}"'
    head = "import os\n\n" if target.key else ""
    if not model.chats:
        return (
            f"{head}from langchain_openai import OpenAIEmbeddings\n\n"
            "# Send texts, not token ids: other models' token ids are meaningless here.\n"
            f'model = OpenAIEmbeddings(model="{model.id}", base_url="{target.base_url}",\n'
            f"                         api_key={key}, check_embedding_ctx_length=False)\n"
            'print(len(model.embed_query("hello")))'
        )
    return (
        f"{head}from langchain_openai import ChatOpenAI\n\n"
        f'model = ChatOpenAI(model="{model.id}", base_url="{target.base_url}", api_key={key})\n'
        'print(model.invoke("Say hello.").content)'
    )


def _key(target: Target) -> str:
    return "$IMPETUS_API_KEY" if target.key else NO_KEY

"""The tables of routes below `/api`, by the service that they need."""

from collections.abc import Iterator, Sequence
from functools import partial

from core.settings import Settings
from router.api.aliases import (
    Alias,
    AliasList,
    AliasTarget,
    aliases_endpoint,
    remove_alias_endpoint,
    set_alias_endpoint,
)
from router.api.bin import (
    BinList,
    BinnedModel,
    bin_endpoint,
    delete_endpoint,
    purge_endpoint,
    restore_endpoint,
)
from router.api.connect import (
    CheckBody,
    SetUpBody,
    SetUpQuery,
    check_client_endpoint,
    clients_endpoint,
    set_up_endpoint,
    write_client_endpoint,
)
from router.api.conversions import (
    ChoicesQuery,
    ConversionRequest,
    choices_endpoint,
    convert_endpoint,
)
from router.api.decisions import DecisionList, decisions_endpoint
from router.api.downloads import (
    DownloadLimitsPatch,
    DownloadRequest,
    change_limits_endpoint,
    download_endpoint,
    downloads_endpoint,
    limits_endpoint,
    partials_endpoint,
    remove_partial_endpoint,
)
from router.api.drain import DrainState, drain_endpoint
from router.api.events import EventsQuery, events_endpoint, state_endpoint
from router.api.files import (
    BrowseQuery,
    FolderQuery,
    ImportRequest,
    browse_endpoint,
    folders_endpoint,
    import_endpoint,
    imports_endpoint,
    remove_folder_endpoint,
)
from router.api.hub import (
    ReadmeQuery,
    ReferenceQuery,
    RepositoryQuery,
    SearchQuery,
    TokenBody,
    readme_endpoint,
    remove_token_endpoint,
    repository_endpoint,
    resolve_endpoint,
    search_endpoint,
    store_token_endpoint,
    token_endpoint,
)
from router.api.jobs import (
    JobMove,
    job_action_endpoint,
    job_endpoint,
    job_move_endpoint,
    jobs_endpoint,
)
from router.api.keys import (
    CreatedKey,
    KeyList,
    NewKey,
    create_key_endpoint,
    list_keys_endpoint,
    revoke_key_endpoint,
)
from router.api.library import ListFilter, ModelList, list_endpoint
from router.api.models import (
    CheckedSettings,
    ModelDetail,
    ModelPlace,
    SettingsPatch,
    change_endpoint,
    check_endpoint,
    load_endpoint,
    locate_endpoint,
    show_endpoint,
    unload_endpoint,
)
from router.api.monitor.routes import monitor_routes
from router.api.session import (
    LinkQuery,
    SessionAnswer,
    SessionCode,
    close_session_endpoint,
    link_endpoint,
    open_session_endpoint,
    show_session_endpoint,
)
from router.api.uploads import (
    NewUpload,
    chunk_endpoint,
    create_upload_endpoint,
    delete_upload_endpoint,
    finish_upload_endpoint,
    upload_endpoint,
    upload_file_endpoint,
    uploads_endpoint,
)
from router.clients.answers import ClientCheck, ClientList, ClientSetUp, WrittenSetUp
from router.context import RouteContext
from router.conversion_service import Conversions, ConversionTargets
from router.events.hub import EventHub
from router.events.messages import ServerEvent, ServerState
from router.http.access import Access
from router.http.drain import Drain
from router.hub_service import (
    Hub,
    HubReadme,
    HubReferenceAnswer,
    HubRepositoryAnswer,
    HubResults,
    HubTokenAnswer,
)
from router.job_service import DownloadLimitsView, JobDetail, JobList, Jobs, PartialList
from router.requests.strict_body import EmptyBody
from router.route import Route
from router.services import Credentials, Management
from router.upload_service import (
    FolderListing,
    LocalFiles,
    ModelFolders,
    UploadFileView,
    UploadList,
    Uploads,
    UploadView,
)

_read = partial(Route, Access.READ, "GET")
_post = partial(Route, Access.MANAGE, "POST")
# What makes something each time it is sent.
_make = partial(_post, is_idempotent=True)
_put = partial(Route, Access.MANAGE, "PUT")
_patch = partial(Route, Access.MANAGE, "PATCH")
_delete = partial(Route, Access.MANAGE, "DELETE")


def api_routes(context: RouteContext, drain: Drain) -> Iterator[Route]:
    """Yield the routes of the services that there are; without `management` there is none."""
    services = context.services
    if services.management is not None:
        yield from _model_routes(context, services.management)
        yield from _alias_routes(context, services.management)
        yield from _client_routes(context)
        decisions = decisions_endpoint(services.management)
        yield _read("/api/decisions", decisions, answer=DecisionList)
        yield _post("/api/drain", drain_endpoint(drain), body=EmptyBody, answer=DrainState)
    if services.jobs is not None:
        yield from _job_routes(services.jobs)
        yield from _download_routes(services.jobs)
    if services.conversions is not None:
        yield from _conversion_routes(services.conversions)
    if services.hub is not None:
        yield from _hub_routes(services.hub)
    if services.uploads is not None:
        yield from _upload_routes(services.uploads)
    if services.files is not None and services.jobs is not None:
        yield from _file_routes(services.files, services.jobs)
    if services.events is not None:
        yield from _event_routes(services.events)
    yield from monitor_routes(services)
    if services.credentials is not None:
        yield from _key_routes(services.credentials)
        yield from _session_routes(services.settings, services.credentials)


def _model_routes(context: RouteContext, management: Management) -> Sequence[Route]:
    one, binned = "/api/models/{model_id:path}", "/api/bin/{bin_id}"
    check, change = check_endpoint(context, management), change_endpoint(context, management)
    load, unload = load_endpoint(context, management), unload_endpoint(context, management)
    restore, locate = restore_endpoint(management), locate_endpoint(context, management)
    act = partial(_post, body=EmptyBody, answer=ModelDetail)
    return [
        _read("/api/models", list_endpoint(context), query=ListFilter, answer=ModelList),
        _post(f"{one}/check", check, body=SettingsPatch, answer=CheckedSettings),
        act(f"{one}/load", load, name="loadModel"),
        _post(f"{one}/locate", locate, body=ModelPlace, answer=ModelDetail),
        act(f"{one}/unload", unload, name="unloadModel"),
        _read(one, show_endpoint(context, management), answer=ModelDetail),
        _patch(one, change, body=SettingsPatch, answer=ModelDetail),
        _delete(one, delete_endpoint(context, management), answer=BinnedModel),
        _read("/api/bin", bin_endpoint(management), answer=BinList),
        _post(f"{binned}/restore", restore, body=EmptyBody, answer=BinnedModel),
        _delete(binned, purge_endpoint(management), answer=BinnedModel),
    ]


def _alias_routes(context: RouteContext, management: Management) -> Sequence[Route]:
    one = "/api/aliases/{alias:path}"
    return [
        _read("/api/aliases", aliases_endpoint(management), answer=AliasList),
        _put(one, set_alias_endpoint(context, management), body=AliasTarget, answer=Alias),
        _delete(one, remove_alias_endpoint(management), status=204),
    ]


def _client_routes(context: RouteContext) -> Sequence[Route]:
    all_, one = "/api/connect", "/api/connect/{client}"
    show, write = set_up_endpoint(context), write_client_endpoint(context)
    check = check_client_endpoint(context)
    return [
        _read(all_, clients_endpoint(context), answer=ClientList),
        _post(f"{one}/check", check, body=CheckBody, answer=ClientCheck),
        _read(one, show, query=SetUpQuery, answer=ClientSetUp),
        _post(one, write, body=SetUpBody, answer=WrittenSetUp),
    ]


def _job_routes(jobs: Jobs) -> Sequence[Route]:
    one = "/api/jobs/{job_id}"
    actions = {"pause": jobs.pause, "resume": jobs.resume, "cancel": jobs.cancel}
    act = partial(_post, body=EmptyBody, answer=JobDetail)
    return [
        _read("/api/jobs", jobs_endpoint(jobs), answer=JobList),
        *(
            act(f"{one}/{name}", job_action_endpoint(action), name=f"{name}Job")
            for name, action in actions.items()
        ),
        _post(f"{one}/move", job_move_endpoint(jobs), body=JobMove, answer=JobDetail),
        _read(one, job_endpoint(jobs), answer=JobDetail),
    ]


def _download_routes(jobs: Jobs) -> Sequence[Route]:
    all_, limits = "/api/downloads", "/api/downloads/limits"
    partials = "/api/downloads/partials"
    begin, change = download_endpoint(jobs), change_limits_endpoint(jobs)
    limited = partial(_read, answer=DownloadLimitsView, name="showDownloadLimits")
    return [
        _read(all_, downloads_endpoint(jobs), answer=JobList),
        _make(all_, begin, body=DownloadRequest, answer=JobDetail, status=202),
        limited(limits, limits_endpoint(jobs)),
        _read(partials, partials_endpoint(jobs), answer=PartialList),
        _delete(f"{partials}/{{partial_id:path}}", remove_partial_endpoint(jobs), status=204),
        _patch(
            limits,
            change,
            body=DownloadLimitsPatch,
            answer=DownloadLimitsView,
            name="changeDownloadLimits",
        ),
    ]


def _conversion_routes(conversions: Conversions) -> Sequence[Route]:
    all_, choices = "/api/convert", "/api/convert/choices"
    show, begin = choices_endpoint(conversions), convert_endpoint(conversions)
    return [
        _read(choices, show, query=ChoicesQuery, answer=ConversionTargets),
        _make(all_, begin, body=ConversionRequest, answer=JobDetail, status=202),
    ]


def _hub_routes(hub: Hub) -> Sequence[Route]:
    search, token = "/api/hub/search", "/api/hub/token"
    one = "/api/hub/models/{owner}/{name}"
    repository, readme = repository_endpoint(hub), readme_endpoint(hub)
    store, resolve = store_token_endpoint(hub), resolve_endpoint(hub)
    return [
        _read(search, search_endpoint(hub), query=SearchQuery, answer=HubResults),
        _read("/api/hub/resolve", resolve, query=ReferenceQuery, answer=HubReferenceAnswer),
        _read(token, token_endpoint(hub), answer=HubTokenAnswer, name="showHubToken"),
        _post(token, store, body=TokenBody, answer=HubTokenAnswer, name="storeHubToken"),
        _delete(token, remove_token_endpoint(hub), answer=HubTokenAnswer, name="removeHubToken"),
        _read(one, repository, query=RepositoryQuery, answer=HubRepositoryAnswer),
        _read(f"{one}/readme", readme, query=ReadmeQuery, answer=HubReadme),
    ]


def _upload_routes(uploads: Uploads) -> Sequence[Route]:
    all_, one = "/api/uploads", "/api/uploads/{upload_id}"
    file, finish = f"{one}/{{file}}", finish_upload_endpoint(uploads)
    create, send = create_upload_endpoint(uploads), chunk_endpoint(uploads)
    return [
        _read(all_, uploads_endpoint(uploads), answer=UploadList),
        _make(all_, create, body=NewUpload, answer=UploadView, status=201),
        _post(f"{one}/finish", finish, body=EmptyBody, answer=JobDetail, status=202),
        _read(one, upload_endpoint(uploads), answer=UploadView),
        _delete(one, delete_upload_endpoint(uploads), status=204),
        _read(file, upload_file_endpoint(uploads), answer=UploadFileView),
        _put(file, send, answer=UploadFileView, is_binary=True),
    ]


def _file_routes(files: LocalFiles, jobs: Jobs) -> Sequence[Route]:
    imports, folders = "/api/imports", "/api/folders"
    remove = remove_folder_endpoint(files)
    return [
        Route(
            Access.MANAGE,
            "GET",
            "/api/fs/browse",
            browse_endpoint(files),
            query=BrowseQuery,
            answer=FolderListing,
        ),
        _read(imports, imports_endpoint(jobs), answer=JobList),
        _make(imports, import_endpoint(files), body=ImportRequest, answer=JobDetail, status=202),
        _read(folders, folders_endpoint(files), answer=ModelFolders),
        _delete(folders, remove, query=FolderQuery, answer=ModelFolders),
    ]


def _event_routes(hub: EventHub) -> Sequence[Route]:
    return [
        _read("/api/events", events_endpoint(hub), query=EventsQuery, event=ServerEvent),
        _read("/api/state", state_endpoint(hub), answer=ServerState),
    ]


def _key_routes(credentials: Credentials) -> Sequence[Route]:
    listed, create = list_keys_endpoint(credentials), create_key_endpoint(credentials)
    return [
        Route(Access.MANAGE, "GET", "/api/keys", listed, answer=KeyList),
        _make("/api/keys", create, body=NewKey, answer=CreatedKey, status=201),
        _delete("/api/keys/{key_id}", revoke_key_endpoint(credentials), status=204),
    ]


def _session_routes(settings: Settings, credentials: Credentials) -> Sequence[Route]:
    path, everyone = "/api/session", Access.OPEN
    sign_in = open_session_endpoint(settings, credentials)
    sign_out = close_session_endpoint(settings, credentials)
    link = link_endpoint(settings, credentials)
    return [
        _read(path, show_session_endpoint(), answer=SessionAnswer),
        Route(everyone, "POST", path, sign_in, body=SessionCode, status=204),
        Route(everyone, "DELETE", path, sign_out, status=204),
        # Without HEAD: that would use the link up.
        Route(everyone, "GET", "/session", link, query=LinkQuery, has_head=False, status=303),
    ]

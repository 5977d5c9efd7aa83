"""A Hugging Face Hub on the loopback: the routes that the real client uses, real files, and refusals on order."""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional
from urllib.parse import unquote, urlsplit

WRITER, READER = 'hf_writer_of_org', 'hf_reader'


@dataclass
class Repo:
    private: bool = False
    branches: Dict[str, str] = field(default_factory=dict)
    commits: Dict[str, Dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: Dict[str, bytes]) -> str:
        oid = hashlib.sha1(f'{len(self.commits)} {branch} {sorted(files)}'.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


def _is_lfs(path: str) -> bool:
    return path.endswith(('.safetensors', '.bin'))


class LoopbackHub:
    """The server; its address is known, and connections to it wait, from the start."""

    def __init__(self) -> None:
        self.repos: Dict[str, Repo] = {}
        self.lfs: Dict[str, bytes] = {}
        self.requests: List[str] = []
        self.refuse: Optional[str] = None  # pattern of paths
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self}))
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def start(self) -> None:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.repos, self.lfs, self.requests, self.refuse = {}, {}, [], None

    def commits_to(self, repo_id: str) -> int:
        """Count commits but for the one that a repository begins with."""
        return len(self.repos[repo_id].commits) - 1


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args: Any) -> None:
        pass

    def do(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.requests.append(f'{self.command} {self.path}')
        if self.hub.refuse and re.search(self.hub.refuse, self.path):
            return self.json({'error': 'on order'}, 400)
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in method.split('|'):
                return route(self, body, *match.groups())
        self.json({'error': f'no route {self.command} {self.path}'}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def json(self, content: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(content).encode(), status, **{'Content_Type': 'application/json', **headers})

    def send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {'Content_Length': len(content), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def token(self) -> str:
        return (self.headers.get('Authorization') or '').removeprefix('Bearer ')

    def may_write(self, repo_id: str) -> bool:
        if self.token() == WRITER and repo_id.startswith('org/'):
            return True
        known = self.token() in (WRITER, READER)
        self.json({'error': 'Forbidden' if known else 'Unauthorized'}, 403 if known else 401)
        return False

    def find(self, repo_id: str, revision: str = 'main') -> Optional[Repo]:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token() not in (WRITER, READER)):
            self.json({'error': 'Repository not found'}, 401, X_Error_Code='RepoNotFound')
            return None
        if revision not in repo.branches and revision not in repo.commits:
            self.json({'error': 'Invalid rev id'}, 404, X_Error_Code='RevisionNotFound')
            return None
        return repo

    def validate_yaml(self, body: bytes) -> None:
        self.json({'errors': [], 'warnings': []})

    def create_repo(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(repo_id):
            return
        if repo_id in self.hub.repos:
            return self.json({'error': 'You already created this model repo'}, 409)
        repo = self.hub.repos[repo_id] = Repo(wanted.get('private') or wanted.get('visibility') == 'private')
        repo.commit('main', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        self.json({'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'id': repo_id})

    def create_branch(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self.may_write(repo_id) and self.find(repo_id)
        if repo:
            repo.branches.setdefault(branch, repo.branches['main'])
            self.json({})

    def info(self, body: bytes, repo_id: str, revision: Optional[str]) -> None:
        revision = revision or 'main'
        repo = self.find(repo_id, revision)
        if not repo:
            return
        siblings = []
        for path, content in repo.files(revision).items():
            blob = hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
            sibling = {'rfilename': path, 'size': len(content), 'blobId': blob}
            if _is_lfs(path):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling['lfs'] = {'sha256': sha256, 'size': len(content), 'pointerSize': 134}
            siblings.append(sibling)
        self.json({'id': repo_id, 'sha': repo.branches.get(revision, revision), 'siblings': siblings})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if self.may_write(repo_id) and self.find(repo_id, revision):
            modes = {f['path']: 'lfs' if _is_lfs(f['path']) else 'regular' for f in json.loads(body)['files']}
            self.json({'files': [{'path': p, 'uploadMode': m, 'shouldIgnore': False} for p, m in modes.items()]})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        if not self.may_write(repo_id):
            return
        objects = []
        for wanted in json.loads(body)['objects']:
            if wanted['oid'] not in self.hub.lfs:
                # The real one's address is signed, and needs no token.
                wanted['actions'] = {'upload': {'href': f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(wanted)
        self.json({'transfer': 'basic', 'objects': objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        self.hub.lfs[oid] = body
        self.send(b'')

    def commit(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self.may_write(repo_id) and self.find(repo_id, branch)
        if not repo:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]['value'].get('parentCommit')
        if parent not in (None, repo.branches[branch]):
            return self.json({'error': 'parent commit is not the head'}, 412)
        files = dict(repo.files(branch))
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.hub.lfs[value['oid']]
            else:
                del files[value['path']]
        oid = repo.commit(branch, files)
        self.json({'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{oid}'})

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self.find(repo_id, revision)
        if not repo:
            return
        commit, content = repo.branches.get(revision, revision), repo.files(revision).get(path)
        if content is None:
            return self.json({'error': 'Entry not found'}, 404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
        etag = (hashlib.sha256 if _is_lfs(path) else hashlib.sha1)(content).hexdigest()
        self.send(content, ETag=f'"{etag}"', X_Repo_Commit=commit)


ROUTES = [
    ('POST', '/api/validate-yaml', _Handler.validate_yaml),
    ('POST', '/api/repos/create', _Handler.create_repo),
    ('POST', r'/api/models/([^/]+/[^/]+)/branch/(.+)', _Handler.create_branch),
    ('POST', r'/api/models/([^/]+/[^/]+)/preupload/(.+)', _Handler.preupload),
    ('POST', r'/api/models/([^/]+/[^/]+)/commit/(.+)', _Handler.commit),
    ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/(.+))?', _Handler.info),
    ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', _Handler.lfs_batch),
    ('PUT', r'/lfs/([0-9a-f]+)', _Handler.lfs_put),
    ('GET|HEAD', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', _Handler.resolve),
]

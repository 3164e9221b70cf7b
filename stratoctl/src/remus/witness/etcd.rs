//! An etcd cluster, by the JSON gateway of its version 3 interface.
//!
//! A record is the value of the key `PREFIX LINEAGE/TERM`, and the outcome of a promotion that of
//! the same key with `.next`; terms have 20 digits, so that their order is that of the keys. A
//! claim is one transaction: if neither the key nor a later one exists, put it; in both cases, get
//! what is there. So a claim whose answer was lost is repeated at any member, and reads its own
//! value. Reads are linearizable. No leases: they would compare clocks.
use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use replication::{Answer, Incarnation, Lineage, Party, Record, Settled, Term, Word};
use rustls::{
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use ureq::{
    Agent,
    tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig},
};

use super::{Witness, identity, same};
use crate::remus::{
    Unknown,
    uuid::Uuid,
    wire::{OutcomeText, RecordText},
};

/// Where keys begin.
const PREFIX: &str = "/stratovirt/replication/";
/// How long one member may take; then another one is asked.
const MEMBER_LIMIT: Duration = Duration::from_secs(1);
/// How long it may take to connect to one.
const CONNECT_LIMIT: Duration = Duration::from_millis(500);
/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// Which cluster, and where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// Its members: `http://HOST:PORT` or `https://HOST:PORT`; at least one.
    urls: Vec<String>,
    /// What keys begin with.
    prefix: String,
    /// With `ca-cert.pem` and, for a cluster that demands them, `client-cert.pem` and
    /// `client-key.pem`.
    tls: Option<PathBuf>,
}

impl FromStr for Cluster {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut this = Self { urls: Vec::new(), prefix: PREFIX.into(), tls: None };
        for word in text.split(',') {
            match word.split_once('=') {
                Some(("prefix", prefix)) if !prefix.is_empty() => {
                    prefix.clone_into(&mut this.prefix)
                }
                Some(("tls", directory)) => this.tls = Some(directory.into()),
                _ => {
                    let rest = word.strip_prefix("http://").or(word.strip_prefix("https://"));
                    if rest.is_none_or(|rest| rest.is_empty() || rest.contains(['/', '=', ' '])) {
                        return Err(format!(
                            "'{word}' is neither a member's URL, http://HOST:PORT or \
                             https://HOST:PORT, nor prefix=KEY or tls=DIR"
                        ));
                    }
                    this.urls.push(word.to_owned());
                }
            }
        }
        let secure = this.urls.iter().any(|url| url.starts_with("https:"));
        match (this.urls.is_empty(), secure && this.tls.is_none()) {
            (true, _) => Err("etcd: needs the URL of at least one member".into()),
            (_, true) => {
                Err("https needs tls=DIR, a directory with the cluster's ca-cert.pem".into())
            }
            _ => Ok(this),
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.urls.join(","))?;
        if self.prefix != PREFIX {
            write!(f, ",prefix={}", self.prefix)?;
        }
        self.tls.as_ref().map_or(Ok(()), |tls| write!(f, ",tls={}", tls.display()))
    }
}

/// A cluster as a witness.
pub struct Etcd {
    agent: Agent,
    /// The one that has answered last comes first.
    urls: Vec<String>,
    prefix: String,
    /// The identity that it has to have.
    expected: Option<String>,
    limit: Duration,
}

impl Etcd {
    /// # Errors
    /// The certificates cannot be read.
    pub fn new(
        cluster: &Cluster,
        expected: Option<String>,
        limit: Duration,
    ) -> Result<Self, Unknown> {
        let mut config = Agent::config_builder()
            .timeout_global(Some(MEMBER_LIMIT))
            .timeout_connect(Some(CONNECT_LIMIT))
            .http_status_as_error(false)
            .max_redirects(0)
            // A proxy that the environment names is for other traffic.
            .proxy(None);
        if let Some(directory) = &cluster.tls {
            config = config.tls_config(tls(directory)?);
        }
        Ok(Self {
            agent: config.build().into(),
            urls: cluster.urls.clone(),
            prefix: cluster.prefix.clone(),
            expected,
            limit,
        })
    }

    fn key(&self, lineage: Lineage, term: Term) -> String {
        format!("{}{}/{:020}", self.prefix, Uuid(lineage.0), term.0)
    }

    /// All keys of later terms: the first that may be one, and the first that is none.
    fn later(&self, lineage: Lineage, term: Term) -> (String, String) {
        let end = format!("{}{}0", self.prefix, Uuid(lineage.0));
        (self.key(lineage, term.next()), end)
    }

    /// Carry out `request` at some member.
    fn call<T: DeserializeOwned + Headed>(
        &mut self,
        path: &str,
        request: &Value,
    ) -> Result<T, Unknown> {
        let deadline = Instant::now() + self.limit;
        let body = request.to_string();
        let mut complaints = Vec::new();
        for (at, url) in self.urls.iter().enumerate() {
            if Instant::now() + MEMBER_LIMIT > deadline {
                break;
            }
            match post::<T>(&self.agent, &format!("{url}{path}"), &body) {
                Ok(reply) => {
                    let cluster = &reply.header().cluster_id;
                    let found = format!("etcd:{cluster}:{}", self.prefix);
                    same(self.expected.as_deref(), &found)?;
                    self.urls.swap(0, at);
                    return Ok(reply);
                }
                Err(why) => complaints.push(format!("{url}: {why}")),
            }
        }
        Err(Unknown::new(format!("etcd: {}", complaints.join("; "))))
    }

    /// Put a value at a key, if there is none yet and, with `only_if_latest`, no later term; in any
    /// case, what there is of the term then.
    fn transact(
        &mut self,
        lineage: Lineage,
        term: Term,
        put: Option<(&str, String)>,
        only_if_latest: bool,
    ) -> Result<Answer, Unknown> {
        let key = self.key(lineage, term);
        let (later, end) = self.later(lineage, term);
        let none = |key: &str| json!({ "key": b64(key), "target": "CREATE", "result": "EQUAL", "create_revision": 0 });
        let look = [
            json!({ "request_range": { "key": b64(&key) } }),
            json!({ "request_range": { "key": b64(&next(&key)) } }),
            json!({ "request_range": { "key": b64(&later), "range_end": b64(&end), "limit": 1,
                "keys_only": true } }),
        ];
        let mut compare = Vec::new();
        let mut success = Vec::new();
        if let Some((key, value)) = &put {
            compare.push(none(key));
            success.push(json!({ "request_put": { "key": b64(key), "value": b64(value) } }));
        }
        if only_if_latest {
            let mut none = none(&later);
            if let Some(none) = none.as_object_mut() {
                none.insert("range_end".into(), b64(&end).into());
            }
            compare.push(none);
        }
        success.extend(look.clone());
        let request = json!({ "compare": compare, "success": success, "failure": look });
        let reply: Transaction = self.call("/v3/kv/txn", &request)?;
        let mut ranges = reply.responses.into_iter().filter_map(|response| response.range);
        let (Some(record), Some(outcome), Some(later)) =
            (ranges.next(), ranges.next(), ranges.next())
        else {
            return Err(Unknown::new("etcd: a transaction has too few results"));
        };
        let Some(mut record) = record.value::<RecordText>()?.map(Record::try_from).transpose()?
        else {
            return Ok(if later.kvs.is_empty() {
                Answer::Record(None)
            } else {
                Answer::Superseded
            });
        };
        if let Some(outcome) = outcome.value::<OutcomeText>()? {
            record.settled = Some(outcome.try_into()?);
        }
        Ok(Answer::Record(Some(record)))
    }
}

impl Witness for Etcd {
    fn identify(&mut self) -> Result<String, Unknown> {
        let request = json!({ "key": b64(&self.prefix), "keys_only": true });
        let reply: Range = self.call("/v3/kv/range", &request)?;
        identity(&format!("etcd:{}:{}", reply.header.cluster_id, self.prefix))
    }

    fn look(&mut self, lineage: Lineage, term: Term) -> Result<Answer, Unknown> {
        self.transact(lineage, term, None, false)
    }

    fn claim(
        &mut self,
        lineage: Lineage,
        term: Term,
        word: Word,
        party: Party,
    ) -> Result<Answer, Unknown> {
        let key = self.key(lineage, term);
        let record = RecordText::from(Record { word, winner: party, settled: None });
        self.transact(lineage, term, Some((key.as_str(), text(&record)?)), true)
    }

    fn settle(
        &mut self,
        lineage: Lineage,
        term: Term,
        winner: Incarnation,
        to: Settled,
    ) -> Result<Answer, Unknown> {
        // The record itself never changes, so it may be read before the transaction.
        let known = self.look(lineage, term)?;
        match known {
            Answer::Record(Some(record))
                if record.word == Word::Promote
                    && record.winner.incarnation == winner
                    && record.settled.is_none() =>
            {
                let key = next(&self.key(lineage, term));
                let outcome = text(&OutcomeText::from(to))?;
                self.transact(lineage, term, Some((key.as_str(), outcome)), false)
            }
            _ => Ok(known),
        }
    }
}

fn next(key: &str) -> String {
    format!("{key}.next")
}

fn b64(text: &str) -> String {
    BASE64.encode(text)
}

fn text(value: &impl Serialize) -> Result<String, Unknown> {
    serde_json::to_string(value).map_err(|e| Unknown::new(e.to_string()))
}

/// One request to one member.
fn post<T: DeserializeOwned>(agent: &Agent, url: &str, body: &str) -> Result<T, String> {
    let sent = agent.post(url).header("content-type", "application/json").send(body);
    let mut reply = sent.map_err(|e| e.to_string())?;
    let status = reply.status();
    let limited = reply.body_mut().with_config().limit(MAX_ANSWER);
    let text = limited.read_to_string().map_err(|e| e.to_string())?;
    if !status.is_success() {
        let said: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        return Err(format!("{status}: {said}"));
    }
    serde_json::from_str(&text).map_err(|e| format!("not an answer of etcd: {e}"))
}

/// What every answer contains.
trait Headed {
    fn header(&self) -> &Header;
}

#[derive(Deserialize)]
struct Header {
    cluster_id: String,
}

/// Absent members are empty.
#[derive(Deserialize)]
struct Transaction {
    header: Header,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Deserialize)]
struct Response {
    #[serde(rename = "response_range")]
    range: Option<Values>,
}

#[derive(Deserialize)]
struct Range {
    header: Header,
}

#[derive(Deserialize)]
struct Values {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    #[serde(default)]
    value: String,
}

impl Headed for Transaction {
    fn header(&self) -> &Header {
        &self.header
    }
}

impl Headed for Range {
    fn header(&self) -> &Header {
        &self.header
    }
}

impl Values {
    /// The value of the only key, if it exists.
    fn value<T: DeserializeOwned>(&self) -> Result<Option<T>, Unknown> {
        let Some(pair) = self.kvs.first() else { return Ok(None) };
        let damaged = |e: String| Unknown::new(format!("etcd: a record is damaged: {e}"));
        let text = BASE64.decode(&pair.value).map_err(|e| damaged(e.to_string()))?;
        serde_json::from_slice(&text).map(Some).map_err(|e| damaged(e.to_string()))
    }
}

/// The settings for TLS, from the files in `directory`.
fn tls(directory: &Path) -> Result<TlsConfig, Unknown> {
    let provider = Arc::new(ring::default_provider());
    let read = |name: &str| {
        let path = directory.join(name);
        match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).map_err(|e| unfit(&path, &e)),
        }
    };
    let (ca, own, key) = (read("ca-cert.pem")?, read("client-cert.pem")?, read("client-key.pem")?);
    let ca_path = directory.join("ca-cert.pem");
    let ca = ca.ok_or_else(|| unfit(&ca_path, &"it does not exist"))?;
    let mut roots = Vec::new();
    for root in CertificateDer::pem_slice_iter(&ca) {
        let root = root.map_err(|e| unfit(&ca_path, &e))?;
        roots.push(Certificate::from_der(&root).to_owned());
    }
    if roots.is_empty() {
        return Err(unfit(&ca_path, &"there is no certificate in it"));
    }
    let client = match (own, key) {
        (Some(own), Some(key)) => Some(client(directory, &own, &key, &provider)?),
        (None, None) => None,
        _ => {
            return Err(unfit(
                directory,
                &"client-cert.pem and client-key.pem belong together, but only one exists",
            ));
        }
    };
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::from(roots))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(provider)
        .build())
}

/// The client's certificate with its key. They are checked here: later there is no error.
fn client(
    directory: &Path,
    chain: &[u8],
    key: &[u8],
    provider: &CryptoProvider,
) -> Result<ClientCert, Unknown> {
    let path = directory.join("client-cert.pem");
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .map_err(|e| unfit(&path, &e))?;
    let secret = directory.join("client-key.pem");
    let der = PrivateKeyDer::from_pem_slice(key).map_err(|e| unfit(&secret, &e))?;
    CertifiedKey::from_der(chain.clone(), der, provider).map_err(|e| unfit(&secret, &e))?;
    let key = PrivateKey::from_pem(key).map_err(|e| unfit(&secret, &e))?;
    let chain: Vec<_> = chain.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    Ok(ClientCert::new_with_certs(&chain, key))
}

fn unfit(path: &Path, why: &dyn fmt::Display) -> Unknown {
    Unknown::new(format!("cannot use {}: {why}", path.display()))
}

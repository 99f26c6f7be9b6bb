//! Single connections and UDP sessions: those that are open, the last ones with the header that was sent, the end of one; and the level
//! of the log, for the next look.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State as Shared};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::guard::Refusal;
use super::{InPath, Server, answer, by, not_utf8, pretty};
use crate::control::view::{Filter, Tapped};
use crate::proxy_protocol::{self, Decoded, explain, spp};

/// Connections shown where no limit is given.
const LIMIT: usize = 100;
/// The highest limit: a worker must not collect for long.
const LIMIT_MAX: usize = 10_000;

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LookQuery {
    listener: Option<String>,
    pool: Option<String>,
    client: Option<String>,
    id: Option<String>,
    limit: Option<usize>,
    follow: Option<String>,
}

type Queried<T> = Result<Query<T>, QueryRejection>;

fn refused(error: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, error)
}

/// Which connections are meant, and whether to follow new ones.
fn filter(query: Queried<LookQuery>) -> Result<(Filter, bool), Refusal> {
    let Query(query) = query
        .map_err(|_| refused("parameters: listener, pool, client (an address or a CIDR), id, limit (a number)"))?;
    let client = query.client.map(|text| {
        let network = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network
            .map_err(|_| refused(format!("client {text:?} is neither an address nor a network; 192.0.2.0/24 is one")))
    });
    let limit = query.limit.unwrap_or(LIMIT).min(LIMIT_MAX);
    let filter =
        Filter { listener: query.listener, pool: query.pool, client: client.transpose()?, id: query.id, limit };
    Ok((filter, query.follow.is_some_and(|follow| follow != "0")))
}

/// A misspelt name would look like one without a connection.
async fn known(server: &Server, filter: (Filter, bool)) -> Result<(Filter, bool), Refusal> {
    let asked = (filter.0.listener.clone(), filter.0.pool.clone());
    let unknown = |error| Refusal::new(StatusCode::NOT_FOUND, error);
    answer(server.state.control.knows(asked)).await?.map_err(unknown)?;
    Ok(filter)
}

pub(super) async fn connections(
    Shared(server): Shared<Server>,
    query: Queried<LookQuery>,
) -> Result<Response, Refusal> {
    let (filter, _) = known(&server, filter(query)?).await?;
    let (connections, open) = answer(server.state.control.connections(filter)).await?;
    Ok(pretty(StatusCode::OK, &json!({ "open": open, "connections": connections })))
}

pub(super) async fn end_connection(
    Shared(server): Shared<Server>,
    path: InPath<String>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let Path(id) = path.map_err(not_utf8)?;
    if answer(server.state.control.end_connection(id.clone(), by(&headers).to_owned())).await? {
        return Ok(pretty(StatusCode::OK, &json!({ "id": id, "ended": true })));
    }
    Err(Refusal::new(StatusCode::NOT_FOUND, format!("no open connection has the id {id:?}; see /connections")))
}

pub(super) async fn tap(
    Shared(server): Shared<Server>,
    query: Queried<LookQuery>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let (filter, follow) = known(&server, filter(query)?).await?;
    if !follow {
        let tapped = answer(server.state.control.tap(filter)).await?;
        let connections: Vec<Value> = tapped.iter().map(value).collect();
        return Ok(pretty(StatusCode::OK, &json!({ "connections": connections })));
    }
    let is_event_stream = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/event-stream"));
    let kind = if is_event_stream { "text/event-stream" } else { "application/x-ndjson" };
    let receiver = answer(server.state.control.follow(filter)).await?;
    let body = Body::new(Following { receiver, is_event_stream });
    Ok(([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-store")], body).into_response())
}

/// A connection, and its header as bytes and in words.
fn value(tapped: &Tapped) -> Value {
    let mut value = json!(tapped.connection);
    value["header"] = header_value(&tapped.header);
    if tapped.missed > 0 {
        value["missed"] = json!(tapped.missed);
    }
    value
}

fn header_value(bytes: &[u8]) -> Value {
    let (version, len, facts, fields) = match (spp::decode(bytes), proxy_protocol::decode(bytes)) {
        (Ok(spp), _) => ("spp", spp::HEADER_BYTES, explain::spp_facts(&spp), explain::spp_fields(&spp)),
        (_, Ok(Decoded::Complete { header, len })) => {
            (header.version.as_str(), len, explain::facts(&header), explain::fields(&header, &bytes[..len]))
        }
        _ => return Value::Null,
    };
    let facts = facts.into_iter().map(|(name, value)| json!({ "name": name, "value": value }));
    let fields = fields.into_iter().map(|field| {
        let hex = explain::hex(&bytes[field.at..field.at + field.len], " ");
        json!({ "at": field.at, "hex": hex, "meaning": field.meaning })
    });
    json!({
        "version": version,
        "bytes": len,
        "hex": explain::hex(bytes, ""),
        "facts": facts.collect::<Vec<_>>(),
        "fields": fields.collect::<Vec<_>>(),
    })
}

/// New connections, a line of JSON each, for as long as the reader stays.
struct Following {
    receiver: mpsc::Receiver<Tapped>,
    is_event_stream: bool,
}

impl hyper::body::Body for Following {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.receiver.poll_recv(cx).map(|tapped| {
            let line = value(&tapped?);
            let text = if self.is_event_stream { format!("data: {line}\n\n") } else { format!("{line}\n") };
            Some(Ok(Frame::data(Bytes::from(text))))
        })
    }
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LevelQuery {
    level: String,
}

pub(super) async fn set_log_level(
    Shared(server): Shared<Server>,
    query: Queried<LevelQuery>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let Query(LevelQuery { level }) =
        query.map_err(|_| refused("the only parameter is level: ?level=debug, ?level=info,preface::health=debug"))?;
    answer(server.state.control.set_log_level(level.clone(), by(&headers).to_owned())).await?.map_err(refused)?;
    Ok(pretty(StatusCode::OK, &json!({ "level": level })))
}

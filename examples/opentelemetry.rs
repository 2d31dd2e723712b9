//! Traces of OpenTelemetry that go through calls: the spans of a client and of a server are in one trace. Hopline itself
//! does not depend on OpenTelemetry; the two middleware here are all that is needed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use hopline::{Client, Context, Error, Fault, Invocation, Method, Middleware, Next, Reply, Server, Service, Style};
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{SpanId, TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider, SpanData};
use tokio::sync::mpsc;
use tracing::{Instrument as _, Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// For clients: the span of a call goes with it.
struct SendSpan;

impl Middleware for SendSpan {
    async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
        let mut carrier = HashMap::new();
        TraceContextPropagator::new().inject_context(&Span::current().context(), &mut carrier);
        if let Some(traceparent) = carrier.get("traceparent") {
            call.set_traceparent(traceparent);
        }
        next.run(call).await
    }
}

/// For servers: the span that has come with a call is the parent of the one here. What nobody waits for is only linked to it.
struct TakeSpan;

impl Middleware for TakeSpan {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        if let Some(traceparent) = call.traceparent() {
            let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
            let caller = TraceContextPropagator::new().extract(&carrier);
            match call.style() {
                Style::Oneway | Style::Event => Span::current().add_link(caller.span().span_context().clone()),
                _ => Span::current().set_parent(caller).unwrap_or_else(|error| eprintln!("no parent: {error}")),
            }
        }
        next.run(call).await
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let exporter = InMemorySpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter.clone()).build();
    let layer = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("shop"))
        // Otherwise a span could not get its parent from within, where a middleware is.
        .with_context_activation(false);
    // The spans of Hopline and of this program, without those of other crates.
    let ours = Targets::new().with_targets([("hopline", LevelFilter::INFO), (module_path!(), LevelFilter::INFO)]);
    tracing_subscriber::registry().with(layer).with(ours).init();

    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let client = Client::builder().with(SendSpan).connect(&url).await?;
    let (noted, mut notes) = mpsc::unbounded_channel();
    let stock = client.clone();
    let shop = Service::new("traced-shop", 1)
        .method("order", move |_: Context, (item,): (u32,)| {
            let stock = stock.clone();
            async move {
                let left = stock.call::<u32>("traced-shop", "take", (item,)).await;
                left.map_err(|error| Fault::new(error.code(), error.to_string()))
            }
        })
        .method("take", |_: Context, (item,): (u32,)| async move { Ok::<_, Fault>(item - 1) })
        .method(Method::new("note").oneway(), move |_: Context, (): ()| {
            let noted = noted.send(());
            async move { noted.map_err(|_| Fault::new(hopline::Code::Internal, "nobody reads notes")) }
        });
    let server = Server::builder().with(TakeSpan).connect(&url).await?.serve(shop).start().await?;

    let shopping = async {
        client.call::<u32>("traced-shop", "order", (7,)).await?;
        client.oneway("traced-shop", "note", ()).send().await
    };
    shopping.instrument(info_span!("checkout")).await?;
    notes.recv().await;
    server.drain().await;
    client.close().await;

    let mut spans = exporter.get_finished_spans()?;
    spans.sort_by_key(|span| span.start_time);
    let mut children = BTreeMap::<[u8; 8], Vec<&SpanData>>::new();
    for span in &spans {
        children.entry(span.parent_span_id.to_bytes()).or_default().push(span);
    }
    print(&children, SpanId::INVALID, 0);
    let calls = spans.iter().filter(|span| span.links.is_empty());
    let traces: BTreeSet<_> = calls.map(|span| span.span_context.trace_id().to_bytes()).collect();
    assert_eq!(traces.len(), 1, "a call and what handles it are in one trace");
    Ok(())
}

/// Prints the spans under one, each below its parent.
fn print(children: &BTreeMap<[u8; 8], Vec<&SpanData>>, parent: SpanId, depth: usize) {
    for span in children.get(&parent.to_bytes()).into_iter().flatten() {
        let linked = if span.links.is_empty() { "" } else { ", linked" };
        println!("{:depth$}{} ({:?}{linked})", "", span.name, span.span_kind, depth = depth * 2);
        print(children, span.span_context.span_id(), depth + 1);
    }
}

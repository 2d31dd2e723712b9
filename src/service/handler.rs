//! A handler as the server knows it: it takes bytes and answers with bytes.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Serialize;

use super::body::Body;
use super::failure::{Failed, Failure};
use super::method::Method;
use crate::codec::{Arguments, Codec, Misfit};
use crate::context::Context;
use crate::error::{Code, Fault};

/// Runs a method: decodes the arguments, calls the function, and encodes what it returns.
pub(crate) type Handler = Arc<dyn Fn(Context, Codec, Bytes) -> BoxFuture<'static, Answer> + Send + Sync>;

/// What a handler returned, encoded.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// The result.
    Result(Body),
    /// The method's own error.
    ServiceError(Body),
    /// A refusal or breakdown.
    Fault(Fault),
}

/// The function that decodes a method's arguments. Its error says what the method takes, and what came instead.
pub(crate) fn arguments_of<A: Arguments>(
    method: &Method,
) -> impl Fn(&Context, Codec, &[u8]) -> Result<A, String> + Send + Sync + use<A> {
    let signature = method.signature.clone();
    move |_, codec, payload| {
        codec.arguments(payload).map_err(|misfit| match misfit {
            Misfit::Count { takes, got } => {
                let s = if takes == 1 { "" } else { "s" };
                format!("`{signature}` takes {takes} argument{s}, got {got}")
            }
            Misfit::Other(why) => format!("the arguments of `{signature}` {why}"),
        })
    }
}

/// The handler that decodes arguments with `read`, calls `handler` with them, and encodes what that returns.
pub(crate) fn running<A, R, E, F, Fut>(
    read: impl Fn(&Context, Codec, &[u8]) -> Result<A, String> + Send + Sync + 'static,
    handler: F,
) -> Handler
where
    F: Fn(Context, A) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, E>> + Send + 'static,
    A: Send + 'static,
    R: Serialize + Send + 'static,
    E: Failure + Send + 'static,
{
    Arc::new(move |context, codec, payload| match read(&context, codec, &payload) {
        Ok(arguments) => answer(codec, handler(context, arguments)).boxed(),
        Err(why) => std::future::ready(Answer::Fault(Fault::new(Code::InvalidArgument, why))).boxed(),
    })
}

/// Encodes what a handler's function returned.
async fn answer<R: Serialize, E: Failure>(codec: Codec, running: impl Future<Output = Result<R, E>>) -> Answer {
    let unwritable = |what, error| Answer::Fault(Fault::new(Code::Internal, format!("the method's {what} {error}")));
    match running.await {
        Ok(result) => match Body::written(|payload| codec.write(&result, payload)) {
            Ok(body) => Answer::Result(body),
            Err(error) => unwritable("result", error),
        },
        Err(failure) => match failure.into_failure(codec) {
            Ok(payload) => Answer::ServiceError(payload.into()),
            Err(Failed::Fault(fault)) => Answer::Fault(fault),
            Err(Failed::Codec(error)) => unwritable("error", error),
        },
    }
}

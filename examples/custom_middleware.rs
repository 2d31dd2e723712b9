//! Two middlewares of one's own: an access log, with a line for each call, and bearer tokens.

use std::time::Duration;

use hopline::{Client, Code, Error, Fault, Finished, Invocation, Middleware, Next, Reply, Server};

#[hopline::service(name = "ledger")]
trait Ledger {
    async fn balance(&self, account: String) -> i64;
    #[rpc(oneway)]
    async fn audit(&self, line: String);
}

struct Book;

impl Ledger for Book {
    async fn balance(&self, _account: String) -> i64 {
        4200
    }

    async fn audit(&self, _line: String) {}
}

/// Prints a line for each call when it is over: also for those that were refused and did not run.
struct AccessLog;

impl Middleware for AccessLog {
    fn finished(&self, done: &Finished<'_>) {
        let call = done.call;
        let (service, method, user) = (call.service(), call.method(), call.user().unwrap_or("-"));
        // A client says `NAME INSTANCE` of itself. The name is the part that people chose.
        let caller = call.caller().and_then(|caller| caller.split(' ').next()).unwrap_or("-");
        let time = |time: Option<Duration>| time.map_or("-".to_owned(), |time| format!("{}us", time.as_micros()));
        let (queued, handled) = (time(done.queue_time), time(done.handler_time));
        println!("{service}.{method} caller={caller} user={user} {} queued={queued} handled={handled}", done.code);
    }
}

/// Adds a token to each call of a client. It may be another one each time: here it could be renewed.
struct AddToken(String);

impl Middleware for AddToken {
    async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
        call.set_metadata("authorization", format!("Bearer {}", self.0));
        next.run(call).await
    }
}

/// Takes calls with a token that it knows. Only the clerk's token is good for `balance`.
struct CheckToken;

impl Middleware for CheckToken {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        let token = call.metadata("authorization").and_then(|value| value.strip_prefix("Bearer "));
        match (token, call.method()) {
            (Some("clerk"), _) | (Some("guest"), "audit") => Ok(()),
            (Some("guest"), method) => {
                Err(Fault::new(Code::PermissionDenied, format!("a guest may not call `{method}`")))
            }
            (Some(_), _) => Err(Fault::new(Code::Unauthenticated, "the token is not known")),
            (None, _) => Err(Fault::new(Code::Unauthenticated, "a call needs a token")),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    // The log is the outer one, so it has a line for what the token check refuses.
    let service = LedgerServer::new(Book).with(AccessLog).with(CheckToken);
    let server = Server::connect(&url).await?.serve(service).start().await?;

    let clerk = Client::builder().name("clerk").with(AddToken("clerk".to_owned())).connect(&url).await?;
    println!("clerk: {:?}", LedgerClient::new(&clerk).balance("1".to_owned()).await);
    LedgerClient::new(&clerk).audit("the clerk was here".to_owned()).send().await?;

    // A token that stays the same needs no middleware.
    let guest = Client::builder().name("guest").metadata("authorization", "Bearer guest").connect(&url).await?;
    println!("guest: {:?}", LedgerClient::new(&guest).balance("1".to_owned()).await);

    let nobody = Client::builder().name("nobody").connect(&url).await?;
    println!("nobody: {:?}", LedgerClient::new(&nobody).balance("1".to_owned()).await);

    server.drain().await;
    Ok(())
}

#[hopline::service]
trait Demo {
    #[rpc(idempotant)]
    async fn put(&self);
    #[rpc(retries = 3, deadline::soft)]
    async fn set(&self);
}

fn main() {}

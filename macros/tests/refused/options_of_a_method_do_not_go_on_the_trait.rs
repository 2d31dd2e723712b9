#[hopline::service]
#[rpc(idempotent)]
trait Demo {
    async fn put(&self);
}

fn main() {}

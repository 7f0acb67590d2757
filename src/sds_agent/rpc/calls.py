"""What the handlers of gRPC calls share."""

import grpc.aio

Context = grpc.aio.ServicerContext[bytes, bytes]


def has_stopped(error: grpc.aio.BaseError) -> bool:
    """Whether it says that the server has stopped since the call came: gRPC has a public name for all but that."""
    return not isinstance(error, grpc.aio.UsageError | grpc.aio.AbortError | grpc.aio.InternalError)


async def next_message(context: Context) -> bytes | None:
    """The next message of a call; None where its peer has nothing more to say or has left, and where the server has
    stopped since the call came.
    """
    try:
        message: object = await context.read()
    except grpc.aio.BaseError as error:
        if not has_stopped(error):
            raise
        return None
    return message if isinstance(message, bytes) else None  # else gRPC's EOF

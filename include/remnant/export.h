#pragma once

/// Marks what libremnant.so exports; everything else has hidden visibility.
#if defined(_WIN32)
#define REMNANT_API
#else
#define REMNANT_API __attribute__((visibility("default")))
#endif
